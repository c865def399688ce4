"""Find the weight matrices of a model and what each does, from the model's structure.

Works on any ``PreTrainedModel``, on the meta device too. No class names are listed: a role follows from where a
module sits (in a repeated block of the base model, in its attention or beside it, in front of the blocks, behind them).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedModel

from compresskit.decomposers import FactorisedEmbedding, FactorisedLinear, Role, Target
from compresskit.errors import InputError
from compresskit.internals.torch import children_of, parameters_of
from compresskit.model.kept import copied, mode_kept
from compresskit.model.sharing import scale_of


def base_prefix(model: PreTrainedModel) -> str:
    """``bert.`` for a BertForMaskedLM, empty for a BertModel."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def find_targets(model: PreTrainedModel) -> list[Target]:
    """Every linear and embedding of the model, in the model's order; a weight that several modules share comes once.

    Those with a role are compressed; the others carry the reason why they stay dense.
    """
    prefix = base_prefix(model)
    embedding = word_embedding(model)
    blocks = block_prefixes(model)
    found = []
    role: Role | None
    for name, *others in _sharers(model):
        module: Any = model.get_submodule(name)
        # Subclasses may compute something else (fused layers): they stay as they are.
        if not all(_plain(model.get_submodule(each)) for each in (name, *others)):
            continue
        if isinstance(module, nn.Embedding):
            role, reason = ("embedding", "") if module is embedding else (None, "not the word embedding")
        elif name.startswith(blocks):
            inside = name[len(next(block for block in blocks if name.startswith(block))) :]
            role, reason = ("attention" if _in_attention(inside) else "ffn"), ""
        else:
            role, reason = _outside_role(model, name.startswith(prefix), module)
        found.append(
            Target(
                name=name,
                kind="embedding" if isinstance(module, nn.Embedding) else "linear",
                role=role,
                shape=(module.weight.shape[0], module.weight.shape[1]),
                bias=getattr(module, "bias", None) is not None,
                padding_idx=getattr(module, "padding_idx", None),
                reason=reason,
                shared=tuple(others),
            )
        )
    return found


def _plain(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Embedding) or scale_of(module) is not None


def _sharers(model: PreTrainedModel) -> list[list[str]]:
    """Names of the modules with a matrix as ``weight``; those with the very same one in one list.

    The word embedding comes first in its list, else an embedding, else the first in the model's order. While
    transformers loads a model on the meta device its weights are not tied yet, so its own map is read; of a live model
    only true ties count (a checkpoint may hold two different matrices).
    """
    ties = model.all_tied_weights_keys or {}
    weights: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():  # a module that several parents hold comes once
        weight = parameters_of(module).get("weight")
        if weight is not None and weight.dim() == 2:
            weights[name] = weight
    lists: dict[int, list[str]] = {}
    used = {id(p) for m in model.modules() for key, p in parameters_of(m).items() if key != "weight"}  # in another way
    for name, weight in weights.items():
        if id(weight) in used:
            continue
        source = weights.get(ties.get(f"{name}.weight", "").removesuffix(".weight"))
        on_meta = weight.device.type == "meta" and source is not None
        lists.setdefault(id(source if on_meta else weight), []).append(name)
    embedding = word_embedding(model)

    def rank(name: str) -> int:
        module = model.get_submodule(name)
        return 0 if module is embedding else 1 if isinstance(module, nn.Embedding) else 2

    return [sorted(names, key=rank) for names in lists.values()]


def block_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Module paths of the base model's repeated blocks, e.g. ``bert.encoder.layer.0.``; outermost ones only."""
    prefix = base_prefix(model)
    paths: list[str] = []
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList):
            paths += [f"{prefix}{name}.{child}." for child, _ in module.named_children()]
    return tuple(path for path in paths if not any(path != outer and path.startswith(outer) for outer in paths))


def _in_attention(path: str) -> bool:
    return any("attention" in part or "attn" in part for part in path.split("."))


def _outside_role(model: PreTrainedModel, in_base: bool, linear: nn.Linear) -> tuple[Role | None, str]:
    """Role of a linear outside the blocks: a head's hidden x hidden linear, or none."""
    config = model.config
    hidden = getattr(config, "hidden_size", None) or getattr(config, "dim", None)
    sizes = {hidden, getattr(config, "embedding_size", hidden)}
    m, n = linear.out_features, linear.in_features
    if linear is model.get_output_embeddings():
        return "head", ""  # untied: a matrix as large as the word embedding
    if n == hidden and m in sizes:
        return "head", ""
    if m == hidden and n in sizes:
        return None, "projects embeddings to the hidden size"
    return None, "neither in a block nor hidden x hidden" if in_base else "last linear of a head"


def users(model: PreTrainedModel, target: Target) -> list[nn.Module]:
    """The modules that compute with a target's weight as its kind does: of a word embedding those that look up, without
    the heads tied to it.
    """
    modules = map(model.get_submodule, (target.name, *target.shared))
    return [module for module in modules if isinstance(module, nn.Embedding) == (target.kind == "embedding")]


def tied_heads(model: PreTrainedModel) -> list[str]:
    """Names of the output linears whose weight is the word embedding's."""
    embedding = word_embedding(model)
    for name, *others in _sharers(model):
        if model.get_submodule(name) is embedding:
            return [other for other in others if isinstance(model.get_submodule(other), nn.Linear)]
    return []


def check_supported(model: PreTrainedModel) -> None:
    """Refuse what is no BERT-style encoder, is compressed already, or has nothing to compress.

    Raises:
        InputError: says which of these, and what the model is.
    """
    kind = type(model).__name__
    if any(isinstance(module, FactorisedLinear | FactorisedEmbedding) for module in model.modules()):
        raise InputError(f"{kind}: is compressed already; start from the dense checkpoint")
    if _holds_decoder(model):
        raise InputError(f"{kind} is or holds a decoder; compresskit takes BERT-style encoders{_encoder_alone(model)}")
    embedding = word_embedding(model)
    if not isinstance(embedding, nn.Embedding):
        what = f"a {type(embedding).__name__} as" if isinstance(embedding, nn.Module) else "no"
        raise InputError(f"{kind} has {what} word embedding; compresskit takes BERT-style text encoders")
    if not any(target.role in ("attention", "ffn") for target in find_targets(model)) and not convolutions(model):
        raise InputError(f"{kind} has nothing to compress: no linear layer in a repeated block")


def _holds_decoder(model: PreTrainedModel) -> bool:
    """Whether the model has a decoder, or is one: a causal family, unless its first token sees the second (XLNet, the
    encoder of bert-generation, Gemma with bidirectional attention).
    """
    parts = (name for name, part in model.named_modules() if isinstance(part, PreTrainedModel))
    if any(name.rpartition(".")[2] == "decoder" for name in parts):
        return True
    if getattr(model.config, "is_encoder_decoder", False) and model.get_encoder() is model:
        return not any(name.partition(".")[0] == "encoder" for name, _ in model.named_children())
    config_class = type(model.config)
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING or config_class in MODEL_FOR_MASKED_LM_MAPPING:
        return False
    return not _sees_what_follows(model)


def _encoder_alone(model: PreTrainedModel) -> str:
    """Says how to take the encoder of a family that has a class for it (T5EncoderModel); empty: it has none."""
    family = sys.modules[type(model).__module__]
    names = [name for name in vars(family) if name.endswith("EncoderModel") and hasattr(transformers, name)]
    if not names:
        return ""
    source = model.config.name_or_path or "MODEL"
    return (
        f"; its encoder alone can be read: in Python, transformers.{names[0]}.from_pretrained({source!r})"
        ".save_pretrained(FOLDER), then copy the tokenizer files to FOLDER and give that"
    )


def _sees_what_follows(model: PreTrainedModel) -> bool:
    """Whether another second token changes the output of the first. False where the model cannot be run."""
    base = model.base_model
    try:
        with mode_kept(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            model.eval()
            first, second = (base(input_ids=torch.tensor([[1, i]], device=model.device))[0][0, 0] for i in (2, 3))
    except Exception:  # every family checks its inputs in its own way
        return False
    return first.device.type != "meta" and not torch.equal(first, second)


def convolutions(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The convolutions in the repeated blocks, by name: they are no matrices and stay dense (SqueezeBERT, ConvBERT)."""
    blocks = block_prefixes(model)
    kinds = (nn.Conv1d, nn.Conv2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and blocks and n.startswith(blocks)}


def word_embedding(model: PreTrainedModel) -> Any:
    """The module that looks words up, or what a family has in its place; None where it has none."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied and shared tensors once, buffers not."""
    return sum(parameter.numel() for parameter in model.parameters())


def skeleton(model: PreTrainedModel, device: str = "meta") -> PreTrainedModel:
    """A copy of the model without memory for weights: same modules and ties.

    On ``meta`` nothing can be computed. On ``cpu`` weights are zeros that all share one number and buffers are real,
    so that it can run.
    """

    def hollow(tensor: torch.Tensor) -> torch.Tensor:
        if device == "meta":
            return torch.empty_like(tensor, device="meta")
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)

    memo: dict[int, object] = {
        id(parameter): nn.Parameter(hollow(parameter), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    for buffer in model.buffers():
        if device == "meta":
            memo[id(buffer)] = hollow(buffer)
        elif buffer.is_meta:  # of a layer that was only planned
            memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return copied(model, memo)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` at module path ``name`` in every parent that holds the old module (shared layers stay shared)."""
    old = model.get_submodule(name)
    for parent, attribute in _holders(model, old):
        setattr(parent, attribute, new)


def _holders(model: nn.Module, child: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in list(model.modules()):
        for attribute, module in list(children_of(parent).items()):
            if module is child:
                yield parent, attribute
