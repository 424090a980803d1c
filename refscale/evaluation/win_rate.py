"""What the arms of a comparison say: how long, and how often a judge prefers it.

In: an arm's run whose policy is still there. Out: for `comparison.compare(extra=…)`: mean length of
the policy's completions of held-out prompts, and, with a judge, its win rate against the reference
model's completions of the same prompts, in both orders. The reference's are made once for all arms.
Completions are greedy, from the very token ids that training saw as prompts.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from refscale.errors import EvaluationError
from refscale.evaluation.generation import (
    GENERATION_VERSION,
    Completion,
    CompletionStep,
    GeneratorSettings,
    replica_settings,
)
from refscale.evaluation.grading import check_prompts, compare
from refscale.evaluation.judge import Judge, JudgeConfig, api_key
from refscale.evaluation.questions import Answer, Question, load_judge_prompts
from refscale.lineage import pinned_model
from refscale.schema import HOLDOUT
from refscale.storage.fingerprints import digest
from refscale.storage.stages import FileRecord, StageFolder
from refscale.storage.store import Store

if TYPE_CHECKING:
    from refscale.run import Run

_CATEGORY = "holdout"
_PROMPT_COLUMNS = ["pair_id", "split", "prompt_ids", "conversational", "prompt"]


@dataclass(frozen=True)
class WinRate:
    """What `comparison.compare` calls with each arm's run.

    Attributes:
        settings: All that the numbers depend on beside the run, as JSON values.
        measure: See `win_rate`.
    """

    settings: dict[str, Any]
    measure: Callable[["Run"], dict[str, Any]]

    def __call__(self, run: "Run") -> Mapping[str, Any]:
        """The numbers of one arm."""
        return self.measure(run)


def win_rate(
    judge: JudgeConfig | None = None,
    *,
    num_prompts: int = 64,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    judge_prompts: str | None = None,
) -> WinRate:
    """Lengths and, with a judge, the win rate of an arm against the reference model.

    Args:
        judge: The endpoint; None measures lengths alone.
        num_prompts: Held-out prompts that are completed: those with the smallest pair ids.
        max_new_tokens: Longest completion.
        batch_size: Prompts completed at once.
        judge_prompts: A judge_prompts.jsonl; None for the package's own.

    Returns:
        For a run it gives `{"num_prompts", "mean_tokens", "cut_share", "reference_mean_tokens"}`,
        and with a judge `"against_reference"` (the overall score of `grading.compare`) and
        `"usage"`.

    Raises:
        ConfigError: The judge's key is not set, or its prompts cannot be read or serve no such
            comparison: said here, since the run comes only after the arm's training.
    """
    prompts = load_judge_prompts(judge_prompts)
    if judge is not None:
        api_key(judge)
        check_prompts([Question("", _CATEGORY, ("",))], prompts, ["pair"])
    settings = {
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "generation": GENERATION_VERSION,
        "judge": None
        if judge is None
        else {
            "endpoint": digest(judge.base_url),  # an address may hold a name and a password
            **judge.model_dump(include={"model", "temperature", "max_tokens", "extra"}),
            "prompts": digest([asdict(prompts[name]) for name in sorted(prompts)]),
        },
    }
    once = threading.Lock()

    def measure(run: "Run") -> dict[str, Any]:
        shared = run.shared or run.store
        asked = _holdout_prompts(run.folder("corpus"), num_prompts)
        if not asked:
            raise EvaluationError(
                "no held-out pair has a prompt to complete; compare without a judge"
            )
        common: dict[str, Any] = {
            "dtype": run.config.model.dtype,
            "attn_implementation": run.config.model.attn_implementation,
            "trust_remote_code": run.config.model.trust_remote_code,
            "max_new_tokens": max_new_tokens,
            **replica_settings(run),
        }
        scored = run.folder("scores").require()["fingerprint"]
        model = pinned_model(run.config.model, scored)
        reference = GeneratorSettings(
            model.model_name_or_path, revision=model.revision, adapter=model.adapter, **common
        )
        policy = GeneratorSettings(run.store.uri_of("policy"), **common)
        with once:
            theirs = _complete(
                run,
                StageFolder(shared, "reference_completions"),
                reference,
                [scored["model"], scored["adapter"]],
                asked,
                batch_size,
            )
        identity = run.folder("policy").require()["identity"]
        ours = _complete(
            run, StageFolder(run.store, "completions"), policy, identity, asked, batch_size
        )
        result: dict[str, Any] = {
            "num_prompts": len(asked),
            "mean_tokens": sum(c.num_tokens for c in ours) / len(ours),
            "cut_share": sum(c.cut for c in ours) / len(ours),
            "reference_mean_tokens": sum(c.num_tokens for c in theirs) / len(theirs),
        }
        if judge is not None:
            asking = Judge(judge, shared)
            questions = [Question(row["pair_id"], _CATEGORY, (row["text"],)) for row in asked]
            graded = compare(
                asking, questions, _answers(asked, ours), _answers(asked, theirs), prompts
            )
            _write_rows(run.store, graded.rows)
            result["against_reference"] = graded.scores["overall"]
            result["usage"] = asking.usage.to_json(judge)
        return result

    return WinRate(settings, measure)


def _holdout_prompts(corpus: StageFolder, limit: int) -> list[dict[str, Any]]:
    """pair_id (hex), ids and text of held-out prompts, each prompt once, by pair id."""
    found: dict[str, dict[str, Any]] = {}
    for record in corpus.require()["files"]:
        table = corpus.read_table(record["name"], columns=_PROMPT_COLUMNS)
        for row in table.filter(pc.equal(table["split"], HOLDOUT)).to_pylist():
            if not row["prompt_ids"]:
                continue
            text = _readable(row["prompt"]) if row["conversational"] else row["prompt"]
            mine = {"pair_id": row["pair_id"].hex(), "ids": row["prompt_ids"], "text": text}
            key = digest(row["prompt_ids"])
            if key not in found or mine["pair_id"] < found[key]["pair_id"]:
                found[key] = mine
        kept = sorted(found.values(), key=lambda row: row["pair_id"])[:limit]
        found = {digest(row["ids"]): row for row in kept}
    return sorted(found.values(), key=lambda row: row["pair_id"])


def _readable(messages: str) -> str:
    """A conversation for the judge: the request alone, or all turns with their roles."""
    turns = json.loads(messages)
    if len(turns) == 1:
        return _said(turns[0])
    return "\n\n".join(f"{turn['role']}: {_said(turn)}" for turn in turns)


def _said(turn: Mapping[str, Any]) -> str:
    """A turn's text, its parts joined; its tool calls as JSON where it has none."""
    content = turn.get("content") or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text") or "") for part in content)
    if not content and turn.get("tool_calls"):
        return json.dumps(turn["tool_calls"], ensure_ascii=False)
    return content


def _complete(
    run: "Run",
    folder: StageFolder,
    settings: GeneratorSettings,
    identity: Any,
    asked: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[Completion]:
    """Greedy completions of the prompts, in order; resumes."""
    from refscale.cluster.runtime import Step, run_graph

    fingerprint = {
        "model": identity,
        "prompts": digest([row["ids"] for row in asked]),
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "batch_size": batch_size,
        "generation": GENERATION_VERSION,
    }
    if not folder.begin(fingerprint):
        records = folder.finished_shards()
        todo = []
        for start in range(0, len(asked), batch_size):
            unit = f"batch-{start // batch_size:05d}"
            if unit not in records:
                ids = [row["ids"] for row in asked[start : start + batch_size]]
                todo.append({"unit": unit, "prompts": json.dumps(ids), "temperature": 0.0})
        ray = run.config.ray
        _ = run.cluster
        steps = [
            Step(
                CompletionStep,
                options={"settings": settings},
                pool=(1, ray.replica_bounds()[1]),
                num_cpus=ray.cpus_per_replica,
                num_gpus=run.gpus(ray.gpus_per_replica),
            ),
            Step(_publish(folder), num_cpus=ray.cpus_per_task),
        ]
        for result in run_graph(todo, steps, stalled_after_s=run.config.score.stalled_after_s):
            record = FileRecord.from_dict(json.loads(result["record"]))
            records[record.name.removesuffix(".parquet")] = record
        folder.finish(fingerprint, records.values(), counts={"prompts": len(asked)}, seconds=0.0)
    return [
        Completion(**row)
        for record in folder.require()["files"]
        for row in folder.read_table(record["name"]).to_pylist()
    ]


def _publish(folder: StageFolder) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def publish(item: dict[str, Any]) -> dict[str, Any]:
        table = pa.Table.from_pylist(json.loads(item["completions"]))
        return {"record": json.dumps(asdict(folder.commit_shard(item["unit"], table)))}

    return publish


def _answers(asked: Sequence[Mapping[str, Any]], said: Sequence[Completion]) -> list[Answer]:
    return [
        Answer(row["pair_id"], (completion.text,), (completion.num_tokens,), (completion.cut,))
        for row, completion in zip(asked, said, strict=True)
    ]


def _write_rows(store: Store, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    store.write_bytes("completions-judged.jsonl", text.encode())
