"""A hub that tests push to, and a machine's caches of it, in the layouts of huggingface_hub."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx2
from huggingface_hub.errors import RevisionNotFoundError


def commit(letter: str) -> str:
    """A commit hash of one letter."""
    return letter * 40


class FakeHub:
    """Answers what HfApi asks of model and dataset repositories.

    Attributes:
        main: By hub id, the commit of main.
        asked: What was asked, as (hub id, revision).
        failing: Makes the error that every question raises; None while the hub can be reached.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.main: dict[str, str] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.failing: Callable[[], Exception] | None = None
        self._commits: dict[str, set[str]] = {}

    def push(self, repo: str, letter: str) -> str:
        """A new commit of main."""
        self.main[repo] = commit(letter)
        self._commits.setdefault(repo, set()).add(commit(letter))
        return commit(letter)

    def info(self, repo: str, *, revision: str | None = None, **_: object) -> SimpleNamespace:
        """As HfApi.model_info and dataset_info."""
        self.asked.append((repo, revision))
        if self.failing is not None:
            raise self.failing()
        if revision in (None, "main") and repo in self.main:
            return SimpleNamespace(sha=self.main[repo])
        if revision not in self._commits.get(repo, ()):
            raise RevisionNotFoundError("not there", response=self.response(404))
        return SimpleNamespace(sha=revision)

    @staticmethod
    def response(status: int) -> httpx2.Response:
        """What an error of the hub carries."""
        return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.test"))

    def download(self, repo: str, letter: str, folder: Path, *, kind: str = "model") -> Path:
        """Put a commit's files into the cache; the cache's main stays what it was."""
        snapshot = self._folder(repo, kind) / "snapshots" / commit(letter)
        shutil.copytree(folder, snapshot)
        return snapshot

    def cache_main(self, repo: str, letter: str, *, kind: str = "model") -> Path:
        """What the cache takes for main."""
        ref = self._folder(repo, kind) / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit(letter))
        return ref

    def _folder(self, repo: str, kind: str) -> Path:
        return self.cache / f"{kind}s--{repo.replace('/', '--')}"


def fake_hub(monkeypatch, cache: Path) -> FakeHub:
    """Put a FakeHub in the hub's place; resolves nothing that the process has resolved before."""
    from huggingface_hub import HfApi, constants

    hub = FakeHub(cache)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(HfApi, name, lambda _self, repo, **options: hub.info(repo, **options))
    next_process(monkeypatch)
    return hub


def cache_dataset(folder: Path, letter: str, rows: list[dict[str, str]]) -> None:
    """Put rows into a cache of `datasets` as a commit of the hub dataset org/d.

    Args:
        folder: datasets.config.HF_DATASETS_CACHE.
        letter: Of the commit.
        rows: Of the split train; all columns are strings.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = folder / "org___d/default/0.0.0" / commit(letter)
    folder.mkdir(parents=True)
    features = datasets.Features({name: datasets.Value("string") for name in rows[0]})
    with ArrowWriter(path=str(folder / "d-train.arrow"), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    split = datasets.SplitInfo("train", num_examples=len(rows), dataset_name="d")
    datasets.DatasetInfo(
        features=features,
        builder_name="json",
        dataset_name="d",
        config_name="default",
        version="0.0.0",
        splits=datasets.SplitDict({"train": split}),
    ).write_to_directory(str(folder))


def next_process(monkeypatch) -> None:
    """Forget the commits that this process has resolved."""
    monkeypatch.setattr("refscale.storage.fingerprints._commits", {})
