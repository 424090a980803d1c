"""A hub that tests push to, and a machine's cache of it, in the layout of huggingface_hub."""

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


def next_process(monkeypatch) -> None:
    """Forget the commits that this process has resolved."""
    monkeypatch.setattr("refscale.storage.fingerprints._commits", {})
