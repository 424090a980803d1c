"""The stages of a run on Ray, in the order in which data flows. The table of contents of refscale.

    prepare    sources -> corpus/ (shards of encoded pairs) and quarantine/
    score      corpus/ -> scores/, one reference model per actor
    select     scores/ -> selection/, the exact global top-k
    train      selection/ -> policy/, DPO with the stored scores and no reference model
    evaluate   holdout of corpus/ -> evaluation/, scored by the policy
    report     everything -> report.html and report.json

Every stage takes the run, skips itself when it is done, refuses a folder made with other settings,
resumes what was begun, and returns its manifest. Ray itself is imported in refscale/cluster/ alone.
"""

import json
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from refscale import schema, summary
from refscale.cluster.room import require_replicas
from refscale.cluster.runtime import Step, disconnect, run_graph
from refscale.cluster.trainer import train_on_ray
from refscale.config import ModelConfig
from refscale.corpus import fragments, planning, preparation
from refscale.errors import ConfigError, EvaluationError, ScoringError
from refscale.evaluation import holdout
from refscale.lineage import (
    fingerprint_before,
    finished_before,
    pinned_model,
    require_encoding,
    require_lineage,
    require_reference,
    weights_of,
)
from refscale.progress import StageProgress, print_counts, print_table, say
from refscale.run import Run, accepted_config, claim, write_config
from refscale.scoring import shard_scoring
from refscale.selection import passes
from refscale.selection.order import Decision
from refscale.selection.radix import RadixSelect, Tally
from refscale.selection.strategies import Moments
from refscale.storage.fingerprints import digest
from refscale.storage.stages import FileRecord, StageFolder
from refscale.training import resumption
from refscale.training.checks import NO_HOLDOUT, check_training
from refscale.training.log import TrainingProgress
from refscale.training.options import WorkerSettings, deciding_options, measuring_decides
from refscale.training.presets import steps_on_cpus

STAGES = ("prepare", "score", "select", "train", "evaluate", "report")
_FRAGMENTS = "corpus/fragments"  # until the corpus is finished
_HOLDOUT = "holdout"  # in training/, while a training measures itself


def run_stages(run: Run, stages: Sequence[str] = STAGES) -> None:
    """Run the named stages in order. The run's lock must be held.

    Raises:
        ConfigError: The training could not begin as it is configured; said before anything else.
        StorageError: The folder's config.yaml is not a run's.
    """
    if "train" in stages:
        check_training(run.config)
    claim(run)
    try:
        for name in stages:
            _STAGE_FUNCTIONS[name](run)
            if name != "report":  # which shows what is there, whatever the config
                write_config(run)
    finally:
        disconnect()


# -- prepare -------------------------------------------------------------------------------------


def prepare(run: Run) -> dict[str, Any]:
    """Read, validate, encode and de-duplicate the sources into shards.

    A map over read units writes fragments sorted by prompt hash; a merge over ranges of that hash
    writes the shards. All pairs of a prompt meet in one range, so duplicates are found exactly
    without collecting rows anywhere, and shared prompts are adjacent in a shard.

    Raises:
        CorpusError: A source cannot be read, or no pair is left.
        TooManyRefusedError: More than corpus.max_bad_fraction of the rows was refused.
    """
    started = time.monotonic()
    config, folder, refused = run.config, run.folder("corpus"), run.folder("quarantine")
    restart = "prepare" in run.restart
    known = None if restart else planning.unchanged(config, finished_before(folder))
    if known and folder.begin(known) and refused.begin(known):
        return _prepared_before(run)
    plan = preparation.plan(config, None if restart else fingerprint_before(folder))
    done = folder.begin(plan.fingerprint, restart=restart)
    # Where the refused rows alone are damaged, they are read again; the shards stay.
    if refused.begin(plan.fingerprint, restart=restart) and done:
        return _prepared_before(run)
    for line in plan.said:
        say(f"prepare   {line}")
    _ = run.cluster
    step_cpus = config.ray.cpus_per_task

    parts = folder.part("fragments")
    finished = parts.finished_shards()
    records = list(finished.values())
    todo = [
        {"unit": i, "fragment": name}
        for i, name in enumerate(fragments.names(len(plan.units)))
        if name not in finished
    ]
    read_before = sum(record.counts["counts"]["read"] for record in records)
    with StageProgress("prepare", None, "rows", done=read_before) as progress:
        read = Step(fragments.read_unit(plan, parts, refused), num_cpus=step_cpus)
        for record in _records(_on_ray(run, todo, [read])):
            records.append(record)
            progress.advance(record.counts["counts"]["read"])
    counts = preparation.Counts.total(record.counts["counts"] for record in records)
    refused.finish(
        plan.fingerprint,
        [FileRecord.from_dict(record.counts["quarantine"]) for record in records],
        counts=counts.quarantined,
        seconds=folder.spent_s + time.monotonic() - started,
    )
    preparation.check_refused(counts, config.corpus.max_bad_fraction, run.store.uri)

    buckets = fragments.plan_buckets(records, config.corpus.shard_pairs)
    shards = fragments.complete_buckets(folder.finished_shards())
    ordered = sorted(records, key=lambda record: record.name)
    merge = Step(fragments.merge_bucket(plan, parts, folder, ordered), num_cpus=step_cpus)
    todo = [asdict(bucket) for bucket in buckets if bucket.bucket not in shards]
    settled = sum(record.rows for found in shards.values() for record in found)
    with StageProgress("prepare", None, "pairs in shards", done=settled) as progress:
        for result in _on_ray(run, todo, [merge]):
            found = [FileRecord.from_dict(record) for record in json.loads(result["records"])]
            shards[result["bucket"]] = found
            progress.advance(sum(record.rows for record in found))
    files = [record for found in shards.values() for record in found if record.rows]
    counts = preparation.Counts.total(
        [counts.as_dict(), *(r.counts["counts"] for found in shards.values() for r in found)]
    )
    counts.check()
    preparation.require_kept(counts)
    manifest = folder.finish(
        plan.fingerprint,
        files,
        counts=counts.as_dict(),
        seconds=folder.spent_s + time.monotonic() - started,
        details={"sources": plan.said, "asked": planning.asked(config)},
    )
    run.store.delete(_FRAGMENTS)
    print_counts("corpus", counts.as_funnel())
    return manifest


def _prepared_before(run: Run) -> dict[str, Any]:
    """The manifest of a finished corpus, which max_bad_fraction is no part of."""
    folder = run.folder("corpus")
    counts = preparation.Counts.total([folder.require()["counts"]])
    preparation.check_refused(counts, run.config.corpus.max_bad_fraction, run.store.uri)
    run.store.delete(_FRAGMENTS)  # what finished it may have been killed right then
    return _skipped(folder)


# -- score ---------------------------------------------------------------------------------------


def score(run: Run) -> dict[str, Any]:
    """Compute the reference model's log-probs of every pair, shard by shard.

    Raises:
        ScoringError: Workers die more often than score.max_attempts allows.
    """
    started = time.monotonic()
    config, corpus, folder = run.config, run.folder("corpus"), run.folder("scores")
    parent = corpus.require()
    require_encoding(config, parent)
    restart = "score" in run.restart
    begun = None if restart else fingerprint_before(folder)
    # Of the commit whose tokenizer encoded the corpus, with the adapter that scoring began with.
    model = pinned_model(
        config.model,
        {"model": parent["fingerprint"]["tokenizer"], "adapter": (begun or {}).get("adapter")},
    )
    settings = _scorer_settings(run, model)
    fingerprint = {
        "corpus": parent["identity"],
        **weights_of(model),
        "dtype": settings.dtype,
        "path": settings.path,
        "quantization": settings.quantization,
        "attn_implementation": settings.attn_implementation,
        "engine": shard_scoring.engine_version(),
    }
    if folder.begin(fingerprint, restart=restart):
        return _skipped(folder)
    shards = {_stem(file["name"]): file["rows"] for file in parent["files"]}
    records = _score_shards(
        run,
        "score",
        settings,
        shards,
        folder,
        shard_scoring.read_pairs(corpus),
        shard_scoring.publish_scores(folder),
    )
    unscorable = [pair for record in records for pair in record.counts["unscorable"]]
    counts = {
        "pairs": sum(record.counts["pairs"] for record in records),
        "scored": sum(record.rows for record in records),
        "unscorable": _tally(reason for _, reason in unscorable),
    }
    if counts["pairs"] != counts["scored"] + len(unscorable) or counts["pairs"] != parent["rows"]:
        raise ScoringError(f"the counts of the scored pairs do not add up: {counts}")
    if not counts["scored"]:
        raise ScoringError(f"none of the {counts['pairs']} pairs could be scored: {counts}")
    seconds = folder.spent_s + time.monotonic() - started
    details = summary.scoring_details(records, seconds)
    manifest = folder.finish(fingerprint, records, counts=counts, seconds=seconds, details=details)
    print_table("scores", summary.scoring_lines(counts, details))
    return manifest


def _score_shards(
    run: Run,
    label: str,
    settings: shard_scoring.ScorerSettings,
    shards: dict[str, int],
    folder: StageFolder,
    read: Callable[[dict[str, Any]], dict[str, Any]],
    publish: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[FileRecord]:
    """Score the shards that `folder` lacks, on a pool of replicas; the records of all of them."""
    config = run.config
    finished = folder.finished_shards()
    records = [record for name, record in finished.items() if name in shards]
    todo = [{"shard": name} for name in shards if name not in finished]
    # Long shards last would leave the other replicas idle.
    todo.sort(key=lambda item: -shards[item["shard"]])
    if todo:
        gpus_each = run.gpus(config.ray.gpus_per_replica)
        require_replicas(config.ray, run.cluster.now(), gpus_each, label)
        # There are no more actors than shards, and the cores are shared among those.
        actors = min(config.ray.replica_bounds()[1], len(todo))
        threads = run.threads(actors, config.ray.cpus_per_replica)
        settings = replace(settings, num_threads=threads)
    cpus = config.ray.cpus_per_task
    steps = [
        Step(read, num_cpus=cpus),
        Step(
            shard_scoring.ShardScorer,
            options={"settings": settings},
            pool=config.ray.replica_bounds(),
            num_cpus=config.ray.cpus_per_replica,
            num_gpus=run.gpus(config.ray.gpus_per_replica),
            attempts=config.score.max_attempts,
        ),
        Step(publish, num_cpus=cpus),
    ]
    scored_before = sum(record.counts["pairs"] for record in records)
    with StageProgress(label, sum(shards.values()), "pairs", done=scored_before) as progress:
        for record in _records(_on_ray(run, todo, steps)):
            records.append(record)
            stats = record.counts["stats"]
            speed = stats["useful_tokens"] / max(record.counts["seconds"], 1e-9)
            progress.advance(record.counts["pairs"], f"{speed:,.0f} tokens/s a replica")
    return sorted(records, key=lambda record: record.name)


def _scorer_settings(run: Run, model: ModelConfig) -> shard_scoring.ScorerSettings:
    config = run.config
    # One dtype for all replicas: a pool of unlike machines must not mix them.
    cuda = run.gpus(config.ray.gpus_per_replica) > 0
    dtype, reason = shard_scoring.resolve_dtype(config.model.dtype, cuda=cuda)
    return shard_scoring.ScorerSettings(
        model_name_or_path=model.model_name_or_path,
        revision=model.revision,
        dtype=dtype,
        dtype_reason=reason,
        dtype_asked=config.model.dtype,
        path=config.score.path,
        token_budget=config.score.token_budget,
        compilation=config.score.compile,
        trust_remote_code=config.model.trust_remote_code,
        attn_implementation=config.model.attn_implementation,
        adapter=model.adapter,
        quantization=config.score.quantization,
        num_threads=None,  # known with the number of replicas
        device="auto" if cuda else "cpu",
    )


# -- select --------------------------------------------------------------------------------------


def select(run: Run) -> dict[str, Any]:
    """Keep the clearest pairs of the training split, exactly.

    Raises:
        SelectionError: The selection is impossible, for example more pairs than there are.
    """
    started = time.monotonic()
    config, corpus, scores, folder = (
        run.config,
        run.folder("corpus"),
        run.folder("scores"),
        run.folder("selection"),
    )
    prepared, parent = corpus.require(), scores.require()
    require_lineage({"corpus": prepared, "scores": parent})
    fingerprint = {"scores": parent["identity"], "select": config.select.deciding_options()}
    if folder.begin(fingerprint, restart="select" in run.restart):
        return _skipped(folder)
    names = [_stem(file["name"]) for file in parent["files"]]
    decision = _decide(run, names)
    found = _pass(run, names, passes.facts(scores, decision), passes.Facts())
    facts = passes.describe(corpus, scores, decision, found)
    keep = Step(
        passes.keep_pairs(corpus, scores, folder, decision),
        num_cpus=config.ray.cpus_per_task,
    )
    finished = folder.finished_shards()
    records = [record for name, record in finished.items() if name in names]
    todo = [{"shard": name} for name in names if name not in finished]
    _ = run.cluster
    with StageProgress("select", len(names), "shards", done=len(records)) as progress:
        for record in _records(_on_ray(run, todo, [keep])):
            records.append(record)
            progress.advance(1)
    passes.check(records, decision)
    shown = json.dumps({"decision": decision.to_json(), **facts}, indent=2).encode()
    record = folder.publish_bytes("selection.json", shown)
    manifest = folder.finish(
        fingerprint,
        [*records, record],
        counts={"kept": sum(r.rows for r in records), "of": facts["num_pairs"]},
        seconds=folder.spent_s + time.monotonic() - started,
        details=facts,
    )
    print_table("selection", summary.selection_lines(facts))
    return manifest


def _decide(run: Run, shards: Sequence[str]) -> Decision:
    """The exact decision: as many passes over the score shards as it takes."""
    scores, spec = run.folder("scores"), passes.spec_of(run.config.select)
    fit = (0.0, 0.0)
    if spec.strategy == "length_adjusted_margin":
        fit = _pass(run, shards, passes.moments(scores), Moments()).fit()
    search = RadixSelect(spec, fit)
    while not search.done:
        search.advance(_pass(run, shards, passes.tally(scores, search, spec, fit), Tally()))
    return search.decision()


def _pass(run: Run, shards: Sequence[str], look: Callable[[Sequence[str]], Any], zero: Any) -> Any:
    """The sum of `look` over the shards: here if they are few, else as tasks on the cluster."""
    groups = passes.chunks(shards)
    if len(groups) == 1:
        return look(groups[0])

    def task(item: dict[str, Any]) -> dict[str, Any]:
        # Between our own processes only, as Ray's own messages are; never written to a file.
        return {"part": pickle.dumps(look(json.loads(item["shards"])))}

    _ = run.cluster
    total = zero
    step = Step(task, num_cpus=run.config.ray.cpus_per_task)
    for result in _on_ray(run, [{"shards": json.dumps(group)} for group in groups], [step]):
        total += pickle.loads(result["part"])
    return total


# -- train ---------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """DPO on the selection with the stored scores; the policy goes to policy/.

    Raises:
        ConfigError: train.eval_steps without a holdout, or evaluate.flipped_column is in no pair
            or says something else than which labels are wrong.
        FingerprintError: The config's model or encoding is not what was scored, or the selection
            is of other scores.
        TrainingError: The start check fails, the loss is not finite, or workers keep dying.
    """
    started = time.monotonic()
    config, folder, policy = run.config, run.folder("training"), run.folder("policy")
    prepared, scores, selected = (
        run.folder(stage).require() for stage in ("corpus", "scores", "selection")
    )
    require_lineage({"corpus": prepared, "scores": scores, "selection": selected})
    require_encoding(config, prepared)
    model = require_reference(config, scores)
    options = config.train.model_dump()
    fingerprint = {
        "selection": selected["identity"],
        "model": scores["fingerprint"]["model"],
        "max_length": config.encoding.max_length,
        "train": deciding_options(options),
        # All checkpoints that compete are measured on the same pairs.
        "holdout_pairs": config.evaluate.max_pairs if measuring_decides(options) else None,
    }
    restart = "train" in run.restart
    if not restart:
        before = [fingerprint_before(policy), fingerprint_before(folder)]
        fingerprint = resumption.as_begun(fingerprint, options, before[0] or before[1])
        restart = resumption.begins_anew(fingerprint, before, folder, policy)
    if policy.begin(fingerprint, restart=restart):
        return _skipped(policy)  # whatever has become of training/: nothing needs it any more
    if column := config.evaluate.flipped_column:
        # The evaluation would refuse it, after the training.
        passes.check_labels(run.folder("corpus"), run.folder("scores"), column)
    folder.begin(fingerprint, restart=restart)
    settings = WorkerSettings(
        train=options,
        model_name_or_path=model.model_name_or_path,
        selection_files=[f"selection/{file['name']}" for file in selected["files"] if file["rows"]],
        output_dir="",
        policy_dir="",
        max_length=config.encoding.max_length,
        holdout_files=_held_out(run, folder) if config.train.eval_steps else [],
        bf16=config.train.bf16
        if config.train.bf16 is not None
        else scores["fingerprint"]["dtype"] == "bfloat16",
        scored_in_bf16=scores["fingerprint"]["dtype"] == "bfloat16",
        revision=model.revision,
        adapter=model.adapter,
        attn_implementation=config.model.attn_implementation,
        chat_template=config.model.chat_template,
        trust_remote_code=config.model.trust_remote_code,
        # As it was scored and selected, whatever the config says now.
        quantization=scores["fingerprint"]["quantization"],
        easiest="smallest"
        if selected["fingerprint"]["select"]["keep"] == "smallest"
        else "largest",
        fingerprint=digest(fingerprint),
    )
    workers = config.train.num_workers
    threads = run.threads(workers, config.ray.cpus_per_worker)
    if steps_on_cpus(config.train.deepspeed):
        say(
            f"train     train.deepspeed has CPUs do the optimizer's step, with {threads} thread(s)"
            " in each worker: ray.cpus_per_worker sets how many"
        )
    with TrainingProgress(folder):
        metrics = train_on_ray(
            settings,
            folder,
            policy,
            name=f"dpo-{digest(fingerprint)[:12]}",
            num_workers=workers,
            cpus_per_worker=config.ray.cpus_per_worker,
            gpus_per_worker=run.gpus(config.ray.gpus_per_worker),
            threads=threads,
            max_failures=config.train.max_failures,
            checkpoints_kept=config.train.save_total_limit,
            wait_for_room_s=0 if run.cluster.embedded else config.ray.wait_for_room_s,
        )
    run.store.delete(folder.file(_HOLDOUT))
    seconds = folder.spent_s + time.monotonic() - started
    counts = {"pairs": selected["counts"]["kept"], "steps": metrics.get("steps")}
    folder.finish(
        fingerprint,
        folder.adopt(["log.jsonl"]),
        counts=counts,
        seconds=seconds,
        details=metrics,
    )
    manifest = policy.finish(
        fingerprint, policy.adopt(), counts=counts, seconds=seconds, details=metrics
    )
    print_table("policy", summary.training_lines(metrics, seconds))
    return manifest


def _held_out(run: Run, training: StageFolder) -> list[str]:
    """Write the pairs that training measures itself on into its folder; files by path in the run.

    They are those that the evaluation looks at.
    """
    config, corpus, scores = run.config, run.folder("corpus"), run.folder("scores")
    held = _holdout_shards(corpus.require())
    if not held:
        raise ConfigError(NO_HOLDOUT)
    # Another max_pairs is of other pairs.
    folder = training.part(f"{_HOLDOUT}/{config.evaluate.max_pairs or 'all'}")
    last, held = summary.holdout_sample(scores, held, config.evaluate.max_pairs)
    finished = folder.finished_shards()
    step = Step(passes.hold_out(corpus, scores, folder, last), num_cpus=config.ray.cpus_per_task)
    todo = [{"shard": name} for name in held if name not in finished]
    _ = run.cluster
    records = [*finished.values(), *_records(_on_ray(run, todo, [step]))]
    return sorted(folder.file(record.name) for record in records if record.rows)


def _holdout_shards(corpus: dict[str, Any]) -> dict[str, int]:
    """Held-out pairs of each corpus shard that has any."""
    held = {_stem(file["name"]): file["counts"]["holdout"] for file in corpus["files"]}
    return {name: count for name, count in held.items() if count}


# -- evaluate ------------------------------------------------------------------------------------


def evaluate(run: Run) -> dict[str, Any]:
    """Score the holdout with the policy and compare with the reference.

    Raises:
        EvaluationError: There is no holdout.
        FingerprintError: The policy is of another selection than the one that is there.
    """
    started = time.monotonic()
    config, corpus, scores, folder = (
        run.config,
        run.folder("corpus"),
        run.folder("scores"),
        run.folder("evaluation"),
    )
    stages = ("corpus", "scores", "selection", "policy")
    manifests = {stage: run.folder(stage).require() for stage in stages}
    require_lineage(manifests)
    prepared, scored, policy = (manifests[stage] for stage in ("corpus", "scores", "policy"))
    settings = _scorer_settings(run, config.model).for_policy(run.store.uri_of("policy"))
    # As it was trained, whatever the config says now.
    beta = policy["fingerprint"]["train"]["beta"]
    fingerprint = {
        "policy": policy["identity"],
        "scores": scored["identity"],
        "evaluate": config.evaluate.model_dump(),
        "beta": beta,
        "dtype": settings.dtype,
        "path": settings.path,
        "attn_implementation": settings.attn_implementation,
        "engine": shard_scoring.engine_version(),
        "statistics": holdout.VERSION,
    }
    if folder.begin(fingerprint, restart="evaluate" in run.restart):
        return _skipped(folder)
    held = _holdout_shards(prepared)
    if not held:
        say("evaluate  no holdout: set corpus.holdout_fraction or mark a source holdout: true")
    if settings.dtype != scored["fingerprint"]["dtype"]:
        say(
            f"evaluate  the reference was scored in {scored['fingerprint']['dtype']} and the policy"
            f" is in {settings.dtype}: its margins also hold the difference of the two"
        )
    if quantization := scored["fingerprint"]["quantization"]:
        say(
            f"evaluate  the reference was scored in {quantization} and the policy is"
            " not: its margins also hold the error of that"
        )
    last, sample = summary.holdout_sample(scores, held, config.evaluate.max_pairs)
    records = _score_shards(
        run,
        "evaluate",
        settings,
        sample,
        folder,
        shard_scoring.read_pairs(corpus, holdout_up_to=last),
        holdout.publish_evaluation(folder, corpus, scores),
    )
    unscorable = _tally(reason for r in records for _, reason in r.counts["unscorable"])
    facts: dict[str, Any] = {"beta": beta, "unscorable": unscorable}
    if held:
        table = summary.read_all(folder, records, schema.EVALUATION)
        if not table.num_rows:
            raise EvaluationError("none of the holdout pairs could be scored by the policy")
        facts.update(holdout.evaluate_pairs(table, beta, seed=config.train.seed))
    if config.evaluate.flipped_column:
        decision = Decision.from_json(
            run.store.read_json(run.folder("selection").file("selection.json"))["decision"]
        )
        shards = [_stem(file["name"]) for file in scored["files"]]
        facts["purity"] = passes.purity(
            corpus, scores, shards, decision, config.evaluate.flipped_column
        )
    manifest = folder.finish(
        fingerprint,
        records,
        counts={"pairs": sum(record.rows for record in records)},
        seconds=folder.spent_s + time.monotonic() - started,
        details=facts,
    )
    print_table("evaluation", summary.evaluation_lines(facts))
    return manifest


# -- report --------------------------------------------------------------------------------------


def report(run: Run) -> dict[str, Any]:
    """Write report.html and report.json from what is there; also for an unfinished run.

    Raises:
        ConfigError: The config.yaml in the folder cannot be read.
    """
    from refscale.report.render import collect, render_html, report_json

    data = collect(run.store, accepted_config(run))
    values = report_json(data)
    run.store.write_json("report.json", values)
    run.store.write_bytes("report.html", render_html(data).encode())
    say(f"report    {run.store.uri}/report.html")
    return values


_STAGE_FUNCTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "prepare": prepare,
    "score": score,
    "select": select,
    "train": train,
    "evaluate": evaluate,
    "report": report,
}


def _on_ray(
    run: Run, todo: Sequence[dict[str, Any]], steps: Sequence[Step]
) -> Iterable[dict[str, Any]]:
    """The results of the items, as they come."""
    return run_graph(todo, steps, stalled_after_s=run.config.score.stalled_after_s)


def _skipped(folder: StageFolder) -> dict[str, Any]:
    manifest = folder.require()
    rows = f" ({manifest['rows']:,} rows)" if manifest["rows"] else ""
    say(f"{folder.stage:<9} done before{rows}, skipped")
    return manifest


def _records(results: Iterable[dict[str, Any]]) -> Iterable[FileRecord]:
    for result in results:
        yield FileRecord.from_dict(json.loads(result["record"]))


def _stem(name: str) -> str:
    return name.removesuffix(".parquet")


def _tally(reasons: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return counts
