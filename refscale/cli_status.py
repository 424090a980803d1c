"""`refscale status`: what is done, what is next, and how fast it went.

In: a run folder, also one that is being worked on. Out: lines of text. Costs a listing of each
stage's folder and its manifest: files are compared with the manifest by size alone, their contents
when a command goes on with them.
"""

from collections.abc import Mapping
from typing import Any

from refscale.errors import StorageError
from refscale.lineage import stale_stages
from refscale.storage.stages import STAGE_FILE, StageFolder
from refscale.storage.store import Store
from refscale.training.log import last_row

_FOLDERS = (
    ("corpus", "prepare"),
    ("scores", "score"),
    ("selection", "select"),
    ("policy", "train"),
    ("evaluation", "evaluate"),
)
_NAMED_FILES = 3

Manifest = Mapping[str, Any]


def status_lines(store: Store) -> list[str]:
    """A line a stage, then the next command."""
    lines, following = [], None
    manifests: dict[str, Manifest] = {}
    for stage, command in _FOLDERS:
        folder = StageFolder(store, stage)
        todo: str | None = command
        try:
            manifest = folder.manifest()
        except StorageError as exc:
            said = f"DAMAGED: {exc}"
        else:
            if manifest is None:
                said = _begun(folder)
            else:
                manifests[stage] = manifest
                stale = stale_stages(manifests).get(stage)
                said, todo = _finished(folder, manifest, stale, command)
        lines.append(f"{command:<9} {said}")
        following = following or todo
    if following is None and not _is_reported(store, manifests):
        following = "report"
    lines.append(f"next: refscale {following}" if following else "complete")
    return lines


def _begun(folder: StageFolder) -> str:
    """How far a stage without a manifest is."""
    if not folder.store.exists(folder.file(STAGE_FILE)):
        return "not done"
    if folder.stage == "policy":
        try:
            row = last_row(StageFolder(folder.store, "training"))
        except ValueError:
            return "unfinished, its log is damaged"
        if not row:
            return "begun"
        return f"unfinished, step {row.get('step', 0)} of {row.get('max_steps', '?')}"
    units = len(folder.part("fragments").recorded_shards())
    shards = len(folder.recorded_shards())
    read = f"{units:,} unit(s) read, " if units else ""
    return f"unfinished, {read}{shards:,} shard(s) done" if units or shards else "begun"


def _finished(
    folder: StageFolder, manifest: Manifest, stale: str | None, command: str
) -> tuple[str, str | None]:
    """What a manifest says, and the command that mends the stage if it needs one."""
    seconds, rows = manifest["seconds"], manifest["rows"]
    amount = f"{rows:,} rows" if rows else ""
    if folder.stage == "policy":
        amount = f"{manifest['counts'].get('steps') or 0:,} steps"
    speed = f", {rows / max(seconds, 1e-9):,.1f} rows/s" if rows else ""
    took = f"{amount} in {seconds:,.1f} s{speed} (finished {manifest['finished']})".lstrip()
    if lost := folder.lost(manifest):
        more = f" and {len(lost) - _NAMED_FILES} more" if len(lost) > _NAMED_FILES else ""
        return f"DAMAGED: {', '.join(lost[:_NAMED_FILES])}{more}; {took}", command
    if stale:
        return f"STALE: {stale}; {took}", f"{command} --restart"
    return f"done: {took}", None


def _is_reported(store: Store, manifests: Mapping[str, Manifest]) -> bool:
    """Whether the report shows what the stages have last finished."""
    if not (store.exists("report.html") and store.exists("report.json")):
        return False
    latest = max(manifest["finished"] for manifest in manifests.values())
    return (store.read_json("report.json").get("finished") or "") >= latest
