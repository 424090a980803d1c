"""Does the selection help? One scored corpus, many selections, each trained and judged alike.

In: a run's config and a grid of arms (what to keep) and seeds. Out: RUN/arms/ARM/seed-S/, a run
folder of its own each that reads corpus/ and scores/ from RUN, and RUN/comparison.json and .html
with mean, spread over the seeds, paired differences against the full corpus and against as many
random pairs, and the cost beside it. Every arm starts from the same model and is evaluated on the
same held-out pairs.

    full                         every pair
    random:0.5                   a random half, drawn anew with each seed: the control
    mean_margin:largest:0.5      a selection; with :matched behind it, of matched lengths

Costs: a training and an evaluation for each arm and seed; scoring happens once. A finished arm is
skipped, a begun one resumed. Pairs that not every policy could score are left out, and counted.
Unless `keep_policies`, an arm's policy and checkpoints are deleted when its numbers are kept: 30
policies of a small model already fill a disk. What one command kept no later one deletes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from refscale.config import Config
from refscale.errors import ConfigError, EvaluationError, FingerprintError
from refscale.experiments.arms import (
    FULL,
    Arm,
    arm_config,
    arm_folder,
    arm_store,
    grid,
    parse_arm,
)
from refscale.experiments.outcomes import (
    by_measure,
    notes_on,
    on_shared_pairs,
    outcomes,
    shared_prompts,
)
from refscale.experiments.statistics import summarise
from refscale.lineage import fingerprint_before
from refscale.progress import say
from refscale.report.comparison_page import render_html
from refscale.secrets import refuse_secrets
from refscale.selection import passes
from refscale.selection.statistics import length_lean
from refscale.storage.fingerprints import first_difference
from refscale.storage.locks import RunLock
from refscale.storage.stages import StageFolder
from refscale.storage.store import Store
from refscale.training.checks import check_training
from refscale.training.options import deciding_options
from refscale.training.resumption import as_begun

if TYPE_CHECKING:
    from refscale.run import Run


class Extra(Protocol):
    """More measurements of an arm's policy, for example `win_rate`; must resume by itself."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the numbers depend on beside the run, as JSON values."""

    def __call__(self, run: "Run") -> Mapping[str, Any]:
        """The numbers of one arm, as JSON values."""


# -- running it ------------------------------------------------------------------------------------


def compare(
    config: Config,
    run_dir: str,
    arms: Sequence[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    parallel: int | None = None,
    keep_policies: bool = False,
    restart: bool = False,
    extra: Extra | None = None,
) -> dict[str, Any]:
    """Train and evaluate every arm with every seed, and write the comparison.

    Args:
        config: Of the run that the arms share; its `select` gives per_source and beta, and its
            match_lengths says whether the arms of the default grid are matched.
        run_dir: The run folder; prepared and scored first, if it is not yet.
        arms: As `parse_arm` reads them; each is what it says, whatever the config's match_lengths.
            None for `grid()`.
        seeds: Each arm is trained once with each: shuffling, and the draw of the random arms.
        parallel: Arms trained side by side; None for as many as the cluster fits.
        keep_policies: Keep the policy and checkpoints of the arms that this command finishes. Those
            of an arm that was finished before stay as they are: kept, or gone.
        restart: Redo these arms with these seeds, and the reference model's completions; arms and
            seeds that are not asked for stay.
        extra: Called with an arm's run while its policy is still there; what it returns is kept
            under "extra".

    Returns:
        What is written to comparison.json.

    Raises:
        ConfigError: An arm cannot be read, there is no seed, something is given twice, parallel or
            a seed is out of its range, evaluate.flipped_column does not say which labels are wrong,
            or the config or the folder's URI holds a secret.
        FingerprintError: An arm was made, or its completions were, with other settings; names the
            field.
        EvaluationError: There is no held-out pair, or an arm lacks too many of them.
    """
    asked = arms or grid(match_lengths=config.select.match_lengths)
    parsed = _checked([parse_arm(text) for text in asked], seeds)
    if parallel is not None and parallel < 1:
        raise ConfigError(f"--parallel must be a positive integer, got {parallel}")
    check_training(config)
    from refscale import pipeline
    from refscale.cluster.runtime import disconnect
    from refscale.run import Run, claim

    refuse_secrets(config, run_dir)  # before a message could show the folder's URI
    store = Store(run_dir)
    with RunLock(store):
        run = Run(store, config)
        claim(run)
        try:
            corpus, scores = pipeline.prepare(run), pipeline.score(run)
            if not any(file["counts"].get("holdout") for file in corpus["files"]):
                raise EvaluationError(
                    "there is no held-out pair to compare the arms on; set corpus.holdout_fraction"
                    " or mark a source holdout: true"
                )
            jobs = [(arm, seed) for seed in seeds for arm in parsed]
            if config.evaluate.flipped_column and (restart or _num_left(store, jobs)):
                # An arm's evaluation would refuse it too, but after its training.
                passes.check_labels(
                    run.folder("corpus"), run.folder("scores"), config.evaluate.flipped_column
                )
            if restart:
                for job in jobs:
                    store.delete(arm_folder(*job))
                store.delete("reference_completions")
            if extra is not None:
                _check_extra(store, jobs, extra.settings)
            left = _num_left(store, jobs)
            # Connected before the threads begin, and not at all where nothing is left to do.
            at_once = min(left, parallel or _fitting(run), len(jobs)) if left else 1
            _ = run.cluster if left else None
            say(
                f"compare   {len(parsed)} arms x {len(seeds)} seeds, {left} of them to do,"
                f" {at_once} at a time"
            )

            def work(job: tuple[Arm, int]) -> dict[str, Any]:
                return _run_arm(run, *job, keep_policies=keep_policies, extra=extra)

            manifests = _side_by_side(work, jobs, at_once)
        finally:
            disconnect()
        results = {
            arm.text: {
                seed: manifest["details"]
                for (other, seed), manifest in zip(jobs, manifests, strict=True)
                if other == arm
            }
            for arm in parsed
        }
        tables, left_out = on_shared_pairs(
            {
                arm.text: {
                    seed: _result(store, arm, seed).read_table("outcomes.parquet") for seed in seeds
                }
                for arm in parsed
            },
            store,
        )
        prompts = shared_prompts(tables, run.folder("corpus"), corpus["files"])
        controls = {arm.text: arm.control for arm in parsed}
        notes = notes_on(left_out)
        comparison = {
            "arms": summarise(by_measure(tables), controls, prompts, full=FULL),
            "runs": results,
            "controls": controls,
            "seeds": list(seeds),
            "num_holdout": len(prompts),
            "left_out": left_out,
            "notes": notes,
            "scoring_s": scores["seconds"],
            "beta": config.train.beta,
            "model": config.model.model_name_or_path,
        }
        store.write_json("comparison.json", comparison)
        store.write_bytes("comparison.html", render_html(comparison).encode())
    return comparison


def _checked(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Arm]:
    given: dict[str, list[Any]] = {"arm": [arm.text for arm in arms], "seed": list(seeds)}
    for what, values in given.items():
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ConfigError(f"the {what} {twice[0]} is given twice; once is enough")
    if not seeds:
        raise ConfigError("a comparison needs at least one seed; three or more show the spread")
    if min(seeds) < 0:  # numpy would refuse it, after the scoring
        raise ConfigError(f"a seed must be at least 0, got {min(seeds)}")
    return list(arms)


def _side_by_side(
    work: Callable[[tuple[Arm, int]], dict[str, Any]], jobs: Sequence[tuple[Arm, int]], at_once: int
) -> list[dict[str, Any]]:
    """The results in order; after a failure or Ctrl-C no further job is begun."""
    if at_once == 1:
        return [work(job) for job in jobs]
    pool = ThreadPoolExecutor(at_once, "arm")  # each thread only waits for Ray
    try:
        futures = [pool.submit(work, job) for job in jobs]
        for future in as_completed(futures):
            future.result()
    except BaseException as exc:
        # What fails ends the comparison when the arms beside it are done; Ctrl-C at once.
        pool.shutdown(wait=isinstance(exc, Exception), cancel_futures=True)
        raise
    pool.shutdown()
    return [future.result() for future in futures]


def _fitting(run: "Run") -> int:
    """Trainings that the cluster fits side by side."""
    cluster, ray, train = run.cluster.now(), run.config.ray, run.config.train
    gpus = run.gpus(ray.gpus_per_worker) * train.num_workers
    if gpus:
        return max(1, int(cluster.gpus // gpus))
    if cluster.embedded:
        return 1  # one training has all the cores already
    return max(1, int(cluster.cpus // (ray.cpus_per_worker * train.num_workers + 1)))


def _result(store: Store, arm: Arm, seed: int) -> StageFolder:
    return StageFolder(arm_store(store, arm, seed), "compare")


def _num_left(store: Store, jobs: Sequence[tuple[Arm, int]]) -> int:
    return sum(_result(store, *job).manifest() is None for job in jobs)


def _run_arm(
    run: "Run",
    arm: Arm,
    seed: int,
    *,
    keep_policies: bool,
    extra: Extra | None,
) -> dict[str, Any]:
    """Select, train and evaluate one arm; the manifest of its results."""
    from refscale import pipeline
    from refscale.run import claim

    store = arm_store(run.store, arm, seed)
    config = arm_config(run.config, arm, seed)
    mine = replace(run, store=store, config=config, shared=run.store)
    result = _result(run.store, arm, seed)
    options = config.train.model_dump()
    asked = {
        "scores": run.folder("scores").require()["identity"],
        "select": config.select.deciding_options(),
        "train": deciding_options(options),
        "evaluate": config.evaluate.model_dump(),
    }
    fingerprint = as_begun(asked, options, fingerprint_before(result))
    # `begin` withdraws the manifest of damaged results, whose policy may have been kept.
    before = result.manifest()
    kept = before is not None and _policy_kept(before)
    if not result.begin(fingerprint):
        say(f"compare   {arm.text}, seed {seed}")
        claim(mine)
        if mine.folder("policy").manifest() is None:
            store.delete("evaluation")  # of a policy that is gone
        selected, trained = pipeline.select(mine), pipeline.train(mine)
        evaluated = pipeline.evaluate(mine)
        table = outcomes(_evaluation_table(mine.folder("evaluation")), config.train.beta)
        details = _details(run, selected, trained, evaluated)
        details["policy_kept"] = keep_policies or kept
        if extra is not None:
            details["extra"] = {**extra(mine), "settings": extra.settings}
        result.finish(
            fingerprint,
            [result.publish_table("outcomes.parquet", table)],
            counts={"pairs": selected["counts"]["kept"], "holdout": table.num_rows},
            seconds=sum(manifest["seconds"] for manifest in (selected, trained, evaluated)),
            details=details,
        )
    manifest = result.require()
    # Also of an arm that was finished before: what finished it may have been killed right then.
    if not keep_policies and not _policy_kept(manifest):
        store.delete("policy")
        store.delete("training/checkpoints")
    if extra is not None and "extra" not in manifest["details"]:
        say(f"compare   {arm.text}, seed {seed} is finished without completions; see --restart")
    return manifest


def _policy_kept(manifest: Mapping[str, Any]) -> bool:
    """Whether the command that finished an arm was to keep its policy."""
    # Arms of earlier versions do not say; what is deleted does not come back.
    return bool(manifest["details"].get("policy_kept", True))


def _check_extra(
    store: Store, jobs: Sequence[tuple[Arm, int]], settings: Mapping[str, Any]
) -> None:
    """Refuse to show arms side by side whose completions were made or judged differently.

    Raises:
        FingerprintError: Names the arm and the field. Its policy is gone.
    """
    for arm, seed in jobs:
        manifest = _result(store, arm, seed).manifest()
        made = manifest["details"].get("extra") if manifest is not None else None
        if made is None:
            continue
        name, old, new = first_difference(made.get("settings", {}), settings)
        if name:
            raise FingerprintError(
                f"the completions of {arm.text}, seed {seed}, were made with {name} = {old}, now it"
                f" is {new}; set it back, or redo these arms with --restart"
            )


def _details(
    run: "Run",
    selected: Mapping[str, Any],
    trained: Mapping[str, Any],
    evaluated: Mapping[str, Any],
) -> dict[str, Any]:
    """What one arm kept, and what it cost: None of a training that was resumed."""
    config = run.config
    workers = config.train.num_workers
    gpus = run.gpus(config.ray.gpus_per_worker) * workers
    # Nobody timed what a killed command had done before the checkpoint.
    whole = not trained["details"].get("resumed")
    kept, every = selected["details"]["kept"], selected["details"]["all"]
    purity = evaluated["details"].get("purity")
    right = None if purity is None else purity["kept"]  # None where no kept pair has the column
    return {
        "pairs": selected["counts"]["kept"],
        "mean_length_difference": kept["mean_length_difference"],
        "mean_length_difference_of_all": every["mean_length_difference"],
        "length_lean": length_lean(every, kept),
        "longer_side": (evaluated["details"].get("overall") or {}).get("longer_side"),
        "right_labels": None if right is None else right["value"],
        "train_s": trained["seconds"] if whole else None,
        "train_gpu_s": trained["seconds"] * gpus if whole else None,
        "steps_s": trained["details"].get("train_runtime_s") if whole else None,
        "steps": trained["details"].get("steps"),
        "train_loss": trained["details"].get("train_loss"),
        "evaluate_s": evaluated["seconds"],
        "gpus": gpus,
        "workers": workers,
    }


def _evaluation_table(folder: StageFolder) -> pa.Table:
    names = [file["name"] for file in folder.require()["files"] if file["rows"]]
    return pa.concat_tables([folder.read_table(name) for name in names])
