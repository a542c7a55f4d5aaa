"""Loading a model and its tokenizer in the trial's process: transformers' own way, everything said explicitly."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import OptkitError, UnavailableError, UsageError, quoted
from optkit.samples import Sample
from optkit.sources import ModelSource, hub_offline_message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optkit.context import TrialContext
    from optkit.settings import Settings

SHRUNK_LAYERS = 2


def load_model(source: ModelSource, trial: TrialContext) -> PreTrainedModel:
    """The default answer to ``load_model``: eval mode, on the trial's device, no code of the model's own."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = trial.settings
    arguments = {
        "dtype": trial.dtype or "auto",
        "trust_remote_code": bool(settings["load.trust_remote_code"]),
    }
    config = load_config(source, settings)
    arguments["attn_implementation"] = config._attn_implementation
    if source.kind == "random":
        return random_model(config, trial)
    folder = Path(source.location)
    if source.kind == "folder" and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UsageError(
            f"'{folder}' holds no weights (*.safetensors); for random weights of its shape use random:{folder / 'config.json'}"
        )
    refuse_adapter(source)
    refuse_unknown_quantization(source, config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            device_map=settings["load.device_map"] or trial.device,
            weights_only=True,
            revision=source.revision or "main",
            **arguments,
        )
    except pickle.UnpicklingError as error:
        raise UsageError(refused_pickle(source, error)) from None
    except (OSError, ValueError, ImportError) as error:
        raise _load_error(source, error) from error
    torch.set_grad_enabled(False)
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes repacks weights with it: moved logits, errors on narrow layers
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def refuse_adapter(source: ModelSource) -> None:
    """:raises UsageError: where transformers would add an adapter in silence, and to another model where the adapter names one."""
    from transformers.utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(source.location, revision=source.revision)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from error
    if found is not None:
        raise UsageError(f"'{source.name}' holds an adapter (adapter_config.json); give the model that it was made for")


def refuse_unknown_quantization(source: ModelSource, config: Any) -> None:
    """:raises UsageError: for a method that transformers would skip: packed weights would then be read as if they were plain."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantized = getattr(config, "quantization_config", None)
    if not isinstance(quantized, dict):
        return
    try:
        known = AutoHfQuantizer.supports_quant_method(quantized)
    except (ValueError, TypeError) as error:
        raise _load_error(source, error) from error
    if not known:
        method = quoted(str(quantized.get("quant_method")))
        raise UsageError(f"'{source.name}' says that its weights are quantized by {method}, which transformers does not know")


def refused_pickle(source: ModelSource, error: Exception) -> str:
    """In one line: weights that are a pickle which would run code when it is read."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f" ({named[1]})" if named else ""
    return (
        f"'{source.name}' holds weights in a pickle that would run code or is damaged{what}: it was not read; "
        "take a model with *.safetensors, or convert the file where you trust it"
    )


def random_model(config: Any, trial: TrialContext) -> PreTrainedModel:
    """True shapes, random weights, created in the dtype that was asked for on the device, or where ``load.device_map`` names another.

    The same seed gives other weights on another device: what is created in host memory is not the baseline's model in its values.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(trial.seed)
    dtype = trial.dtype or getattr(config, "dtype", None) or torch.float32
    placed = trial.settings["load.device_map"]
    with torch.device(placed if placed == "cpu" else trial.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=config._attn_implementation, trust_remote_code=False
        )
    model.generation_config.eos_token_id = getattr(config, "eos_token_id", None)
    return model.eval()


def load_config(source: ModelSource, settings: Settings) -> Any:
    """The configuration, without what a model's file must not decide: code, kernels, the attention implementation."""
    from transformers import AutoConfig

    try:
        if source.kind == "random":
            raw = json.loads(Path(source.location).read_text())
            raw.pop("auto_map", None)
            config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        else:
            config = AutoConfig.from_pretrained(
                source.location, trust_remote_code=bool(settings["load.trust_remote_code"]), revision=source.revision or "main"
            )
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(source, error) from error
    config._attn_implementation = attention_for(config, settings["load.attention"])
    if source.shrink:
        shrink(config)
    return config


def attention_for(config: Any, wanted: str) -> str:
    """``wanted``, but eager where the model caps its attention logits: SDPA has no such cap, and transformers drops it in silence."""
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    return "eager" if capped and wanted == "sdpa" else wanted


def shrink(config: Any) -> None:
    """The same architecture with two layers."""
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = min(SHRUNK_LAYERS, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]


def load_tokenizer(source: ModelSource) -> Any:
    """The source's tokenizer; a byte-level one for random weights without tokenizer files."""
    from transformers import AutoTokenizer

    folder = Path(source.location).parent if source.kind == "random" else Path(source.location)
    if source.kind != "hub" and not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        return byte_tokenizer()
    try:
        place = source.location if source.kind == "hub" else str(folder)
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, revision=source.revision or "main")
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from error


def byte_tokenizer() -> Any:
    """256 tokens, one a byte: for shapes without a vocabulary of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def encode(samples: list[Sample], tokenizer: Any, *, eos: int | None, max_length: int, vocabulary: int, seed: int) -> None:
    """Fill ``prompt_ids`` and ``answer_ids`` of each sample in place.

    A text sample is scored from its second token on. Answers end with the end-of-text token. Samples are cut to ``max_length`` tokens:
    prompts from the left, texts from the right. Ids that the model has no embedding for (a byte tokenizer over a tiny vocabulary) wrap.
    """
    for sample in samples:
        if "random_tokens" in sample.extra:
            sample.prompt_ids = random_ids(sample, vocabulary, seed)
        elif sample.text is not None:
            ids = tokenizer(sample.text).input_ids[:max_length]
            sample.prompt_ids, sample.answer_ids = ids[:1], ids[1:]
        else:
            sample.prompt_ids = encode_prompt(sample, tokenizer)
            if sample.answer is not None:
                sample.answer_ids = tokenizer(sample.answer, add_special_tokens=False).input_ids + ([eos] if eos is not None else [])
            room = max_length - len(sample.answer_ids)
            if len(sample.prompt_ids) > room:
                sample.prompt_ids = sample.prompt_ids[-max(room, 1) :]
        if not sample.prompt_ids:
            raise UsageError(f"sample '{sample.id}' has no tokens; remove it or give it a prompt")
        sample.prompt_ids = [token % vocabulary for token in sample.prompt_ids]
        sample.answer_ids = [token % vocabulary for token in sample.answer_ids]


def encode_prompt(sample: Sample, tokenizer: Any) -> list[int]:
    if sample.messages is None:
        return tokenizer(sample.prompt).input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"sample '{sample.id}' has messages, and this model's tokenizer has no chat template; give it a 'prompt' instead")
    text = tokenizer.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def random_ids(sample: Sample, vocabulary: int, seed: int) -> list[int]:
    import random

    draw = random.Random(f"{seed}/{sample.id}")
    return [draw.randrange(vocabulary) for _ in range(int(sample.extra["random_tokens"]))]


def _load_error(source: ModelSource, error: Exception) -> OptkitError:
    if source.kind == "hub":
        return UnavailableError(hub_offline_message(source.location, error))
    return UsageError(f"cannot load the model from '{source.location}': {' '.join(str(error).split())[:300]}")
