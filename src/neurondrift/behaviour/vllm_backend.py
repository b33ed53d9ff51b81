"""Answers by vLLM, behind the same interface as our own loop. UNTESTED: written from vLLM's documentation.

vLLM needs a GPU (or its own build for CPUs) and was not at hand when this was written; no test runs it. It has no early
stop, and it loads a model by its reference, so it cannot run a model under an intervention. An adapter stays unmerged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import read_json
from neurondrift.behaviour.requests import Decoding, Request, row_seed
from neurondrift.models.batches import context_length
from neurondrift.models.checked.gguf import is_gguf
from neurondrift.models.text.thoughts import decoded, marking_tokens

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for


class VllmModel:
    """A model loaded by vLLM.

    Parameters
    ----------
    reference
        A hub id, or a folder that `save_pretrained` wrote.
    adapter
        Folder of a LoRA adapter on top.
    dtype, revision, trust_remote_code
        As in `load_model`; other settings are vLLM's own defaults.

    Raises
    ------
    ConfigError
        vLLM is not installed, or the reference is one of ours that vLLM does not know.
    """

    def __init__(
        self,
        reference: str,
        *,
        adapter: Path | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if is_gguf(reference) or reference.startswith("tiny:"):
            raise ConfigError("vLLM loads hub ids and folders only", received=reference, fix="--backend transformers")
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ConfigError(
                f"The backend vllm needs vLLM ({error})",
                fix="pip install 'neurondrift[vllm]', or --backend transformers",
            ) from error
        settings: dict[str, Any] = {}
        if adapter is not None:
            rank = int(read_json(adapter / "adapter_config.json")["r"])
            settings = {"enable_lora": True, "max_lora_rank": next(room for room in LORA_RANKS if room >= rank)}
        self.engine = LLM(
            model=reference, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **settings
        )
        self.adapter = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        self.tokenizer = self.engine.get_tokenizer()
        self.context = _context(reference, revision, trust_remote_code)


def _context(reference: str, revision: str | None, trust_remote_code: bool) -> int:
    from transformers import AutoConfig

    class _Configured:
        config = AutoConfig.from_pretrained(reference, revision=revision, trust_remote_code=trust_remote_code)

    return context_length(_Configured())


def answer_with_vllm(
    model: VllmModel,
    requests: Sequence[Request],
    ids: Sequence[Sequence[int]],
    *,
    decoding: Decoding,
    advance: Callable[[int], None],
) -> list[str]:
    """The answer to each request, whose token ids are given. Seeds are those of our own loop, draws are not."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens,
            seed=row_seed(request, decoding.seed) if decoding.temperature > 0 else None,
        )
        for request in requests
    ]
    outputs = model.engine.generate(
        [{"prompt_token_ids": list(tokens)} for tokens in ids], parameters, lora_request=model.adapter
    )
    advance(len(requests))
    marks = marking_tokens(model.tokenizer)
    return [decoded(model.tokenizer, list(output.outputs[0].token_ids), marks).strip() for output in outputs]
