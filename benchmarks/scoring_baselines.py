"""Who else can score pairs: each a function from the same ids to the same two columns of sums.

Every one of them gets the ids of the corpus, so that nothing but the scoring differs. A scorer that
is not installed is left out and named in the result.
"""

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scoring_models
import torch

from refscale.scoring.cpu_products import use_onednn
from refscale.scoring.encoded_pairs import EncodedPairs
from refscale.scoring.padding import padded_batches
from refscale.scoring.reference import ReferenceModel

Columns = tuple[np.ndarray, np.ndarray]
Scorer = Callable[[EncodedPairs], Columns]

PACKED = "refscale packed"
COMPILED = "refscale packed, compiled"
PADDED = "refscale padded"
PAIR_BY_PAIR = "refscale packed, pair by pair"
TRL = "TRL precompute"
HF = "HF padded, full log_softmax"
HF_SORTED = "HF padded, length-sorted"
CT2 = "CTranslate2 score_batch"
CT2_INT8 = "CTranslate2 score_batch, int8"
LM_EVAL = "lm-evaluation-harness hf"

_BATCH = 8  # TRL's default per_device_train_batch_size, which its precompute uses
_SORTED_TOKENS = 4096


def as_loaded(model: Any) -> Any:
    """The model as `ReferenceModel.load` prepares it; on a CPU a copy: peers get it plain."""
    if next(model.parameters()).device.type == "cpu":
        model = copy.deepcopy(model)
        use_onednn(model)
    return model


def ours(
    model: Any, path: str, token_budget: int | None, *, compilation: str = "off"
) -> tuple[ReferenceModel, Scorer]:
    """The engine on one path."""
    reference = ReferenceModel.from_model(
        model,
        path=path,  # type: ignore[arg-type]
        token_budget=token_budget,
        compilation=compilation,  # type: ignore[arg-type]
    )

    def score(pairs: EncodedPairs) -> Columns:
        scores = reference.score(pairs)
        if compilation == "on" and reference.info["compiled"] != "yes":
            raise RuntimeError(f"not compiled: {reference.info['compiled']}")
        return scores.chosen_logps, scores.rejected_logps

    return reference, score


def pair_by_pair(reference: ReferenceModel, parts: Sequence[EncodedPairs]) -> Scorer:
    """The engine on parts none of which has two pairs of a prompt; columns in their order."""

    def score(_pairs: EncodedPairs) -> Columns:
        scores = [reference.score(part) for part in parts]
        return (
            np.concatenate([s.chosen_logps for s in scores]),
            np.concatenate([s.rejected_logps for s in scores]),
        )

    return score


def hf_padded(model: Any) -> Scorer:
    """The usual loop: batches of 8 pairs in corpus order, all logits, log_softmax, gather."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def side(pairs: EncodedPairs, completions: Sequence[np.ndarray]) -> np.ndarray:
        sums = []
        for start in range(0, len(pairs), _BATCH):
            rows = range(start, min(start + _BATCH, len(pairs)))
            whole = [np.concatenate([pairs.prompt_ids[i], completions[i]]) for i in rows]
            width = max(map(len, whole))
            ids = torch.zeros(len(whole), width, dtype=torch.int64)
            mask, scored = torch.zeros_like(ids), torch.zeros_like(ids)
            for j, (i, sequence) in enumerate(zip(rows, whole, strict=True)):
                ids[j, : len(sequence)] = torch.from_numpy(sequence)
                mask[j, : len(sequence)] = 1
                scored[j, max(len(pairs.prompt_ids[i]), 1) : len(sequence)] = 1
            ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            taken = logps.gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]
            sums.append(taken.sum(dim=1).cpu().numpy())
        return np.concatenate(sums)

    return lambda pairs: (side(pairs, pairs.chosen_ids), side(pairs, pairs.rejected_ids))


def hf_sorted(model: Any) -> Scorer:
    """Length-sorted batches of 4,096 tokens without a mask, logits of the completion rows only."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def score(pairs: EncodedPairs) -> Columns:
        sequences = [
            (prompt, completion)
            for side in (pairs.chosen_ids, pairs.rejected_ids)
            for prompt, completion in zip(pairs.prompt_ids, side, strict=True)
        ]
        sums = np.zeros(len(sequences))
        for batch in padded_batches(sequences, range(len(sequences)), _SORTED_TOKENS):
            ids = torch.from_numpy(batch.ids).to(device)
            asked = torch.zeros(ids.numel(), dtype=torch.bool)
            asked[batch.rows] = True
            output = model(
                input_ids=ids, use_cache=False, logits_to_keep=asked.view(ids.shape).to(device)
            )
            logps = torch.log_softmax(output.logits.flatten(0, -2).float(), dim=-1)
            taken = logps.gather(1, torch.from_numpy(batch.targets).to(device)[:, None])[:, 0]
            np.add.at(sums, batch.sequences[batch.owners], taken.cpu().numpy())
        return sums[: len(pairs)], sums[len(pairs) :]

    return score


@contextlib.contextmanager
def trl_precompute(model: Any, tokenizer: Any) -> Iterator[Scorer]:
    """TRL's own `_precompute_ref_logps` over a dataset of the same ids."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    weights = next(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            report_to=[],
            precompute_ref_log_probs=True,
            per_device_train_batch_size=_BATCH,
            bf16=weights.dtype == torch.bfloat16,
            use_cpu=weights.device.type == "cpu",
            max_length=4096,
            disable_tqdm=True,
        )
        text = [{"prompt": "w2", "chosen": " w3", "rejected": " w4"}]
        trainer = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(text),
            processing_class=tokenizer,
        )
        model.eval()

        def score(pairs: EncodedPairs) -> Columns:
            rows = datasets.Dataset.from_dict(
                {
                    "prompt_ids": [*map(np.ndarray.tolist, pairs.prompt_ids)],
                    "chosen_ids": [*map(np.ndarray.tolist, pairs.chosen_ids)],
                    "rejected_ids": [*map(np.ndarray.tolist, pairs.rejected_ids)],
                }
            )
            scored = trainer._precompute_ref_logps(rows, "benchmark", _BATCH)
            return np.array(scored["ref_chosen_logps"]), np.array(scored["ref_rejected_logps"])

        yield score


@contextlib.contextmanager
def ctranslate2(model: Any, tokenizer: Any, compute_type: str) -> Iterator[Scorer]:
    """CTranslate2's `Generator.score_batch`, batches of 4,096 tokens."""
    import ctranslate2 as library

    device = next(model.parameters()).device
    with scoring_models.as_folder(model, tokenizer) as folder:
        target = os.path.join(folder, "converted")
        library.converters.TransformersConverter(folder).convert(target, quantization=compute_type)
        generator = library.Generator(
            target,
            device=device.type,
            compute_type=compute_type,
            intra_threads=torch.get_num_threads(),
            inter_threads=1,
        )
        words = tokenizer.convert_ids_to_tokens(range(model.config.get_text_config().vocab_size))

        def side(pairs: EncodedPairs, completions: Sequence[np.ndarray]) -> np.ndarray:
            whole = [
                [words[i] for i in np.concatenate(parts).tolist()]
                for parts in zip(pairs.prompt_ids, completions, strict=True)
            ]
            found = generator.score_batch(whole, max_batch_size=_SORTED_TOKENS, batch_type="tokens")
            return np.array(
                [
                    sum(result.log_probs[max(len(prompt), 1) - 1 :])
                    for result, prompt in zip(found, pairs.prompt_ids, strict=True)
                ]
            )

        yield lambda pairs: (side(pairs, pairs.chosen_ids), side(pairs, pairs.rejected_ids))


def lm_eval(model: Any, tokenizer: Any) -> Scorer:
    """lm-evaluation-harness's `hf` model, its loglikelihood on given ids, batches of 8."""
    from lm_eval.models.huggingface import HFLM

    device = next(model.parameters()).device
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=_BATCH,
        device=str(device),
        max_length=4096,
    )

    def side(pairs: EncodedPairs, completions: Sequence[np.ndarray]) -> np.ndarray:
        requests = [
            ((f"p{i}", f"c{i}"), prompt.tolist(), completion.tolist())
            for i, (prompt, completion) in enumerate(
                zip(pairs.prompt_ids, completions, strict=True)
            )
        ]
        found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        return np.array([logp for logp, _greedy in found])

    return lambda pairs: (side(pairs, pairs.chosen_ids), side(pairs, pairs.rejected_ids))


def installed(module: str) -> bool:
    """Whether an optional peer can be imported."""
    return importlib.util.find_spec(module) is not None


@torch.inference_mode()
def oracle(model: Any, pairs: EncodedPairs) -> Columns:
    """A sequence at a time, the model's own logits, float64 log_softmax."""
    device = next(model.parameters()).device

    def side(completions: Sequence[np.ndarray]) -> np.ndarray:
        sums = []
        for prompt, completion in zip(pairs.prompt_ids, completions, strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(device)
            first = max(len(prompt), 1)
            keep = torch.arange(first - 1, len(ids) - 1, device=device)
            logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep).logits[0]
            logps = torch.log_softmax(logits.double(), dim=-1)
            sums.append(logps.gather(1, ids[first:, None]).sum().item())
        return np.array(sums)

    return side(pairs.chosen_ids), side(pairs.rejected_ids)
