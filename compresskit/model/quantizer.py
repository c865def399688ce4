"""How a compressed folder reloads through transformers: our entry in its quantizer registry.

``config.json`` holds ``quantization_config`` with ``quant_method: compresskit`` and the specs; before weights are
loaded, the factorised layers are put in place on the meta device. Imported by a hook once transformers is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compresskit.decomposers import (
    AnyDecomposer,
    FactorisedEmbedding,
    FactorisedLinear,
    Group,
    Spec,
    Target,
    TiedHead,
    registry,
)
from compresskit.errors import InputError
from compresskit.internals.transformers import is_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers is half imported when this module is: what needs its models is imported inside the functions.

QUANT_METHOD = "compresskit"
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class CompresskitConfig(QuantizationConfigMixin):
    """The specs of a compressed model, as ``config.json`` stores them.

    Args:
        format_version: of this format; a newer one is refused.
        base: group name relative to the base model -> spec (plain data). Always applied. Of a group of several
            ``targets`` names them.
        head: full name -> spec, for heads and poolers. Entries that the loading class lacks are skipped.
        shared: parameters that are one and the same tensor beyond the family's own ties, as the dense model names them:
            name -> name of the first, relative to the base model where both are in it. Not stored where there are none.
    """

    def __init__(
        self,
        base: dict[str, dict[str, Any]] | None = None,
        head: dict[str, dict[str, Any]] | None = None,
        shared: dict[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"this checkpoint has compresskit format version {format_version}, "
                f"this compresskit reads version {FORMAT_VERSION}: update compresskit"
            )
        if unknown:
            raise InputError(f"quantization_config: unknown key {next(iter(unknown))!r}")
        self.quant_method = quant_method  # type: ignore[assignment]  # the enum knows only transformers' own
        self.format_version = format_version
        self.base = base or {}
        self.head = head or {}
        self.shared = shared or {}

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {key: value for key, value in super().to_dict().items() if key != "shared" or value}

    @classmethod
    def from_groups(
        cls, model: PreTrainedModel, chosen: list[tuple[Group, Spec]], shared: Mapping[str, str]
    ) -> CompresskitConfig:
        """The config of ``model`` with these groups factorised; ``shared`` as :func:`undeclared_ties` of the dense one
        finds it.
        """
        from compresskit.model.targets import base_prefix

        prefix = base_prefix(model)
        config = cls(shared={_within(name, prefix): _within(owner, prefix) for name, owner in shared.items()})
        for group, spec in chosen:
            entry = spec.model_dump(mode="json")
            names = [target.name for target in group.targets]
            if group.role == "head" or not names[0].startswith(prefix):
                table, strip = config.head, ""
            else:
                table, strip = config.base, prefix
            if names != [group.name]:
                entry["targets"] = [name.removeprefix(strip) for name in names]
            table[group.name if len(names) > 1 else group.name.removeprefix(strip)] = entry
        return config


@register_quantizer(QUANT_METHOD)
class CompresskitHfQuantizer(HfQuantizer):
    """Puts factorised layers in place before transformers loads the weights.

    Attributes:
        extra_tensors: stored by ``save_pretrained`` beside the model's own, by full name: tensors of the base model
            that the model's class does not use.
        given: the tensors that ``save_pretrained`` was given, while it runs; None: it saves the model's own.
    """

    quantization_config: CompresskitConfig

    def __init__(self, quantization_config: CompresskitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.extra_tensors: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] | None = None

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if not self.extra_tensors:
            return self.given, {}
        own = model.state_dict() if self.given is None else self.given
        # The model may have been cast since they were read.
        return {**own, **{k: tensor.to(model.dtype) for k, tensor in self.extra_tensors.items()}}, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        mount_config(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _check_devices(model)
        for module in model.modules():
            # transformers initialises the biases of a new head by the class of its layers, and does not know ours.
            bias = module.bias if isinstance(module, TiedHead) else None
            if bias is not None and not is_read(bias):
                torch.nn.init.zeros_(bias)
            if isinstance(module, FactorisedLinear):
                _initialise_new(module, getattr(model.config, "initializer_range", 0.02))
        attach(model, self)
        return model

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """What ``model.dequantize()`` does: ordinary layers with the weights multiplied out, in place.

        transformers would take the dtype from ``config.dtype``: a save leaves text there, and ``half`` what it was.

        Args:
            model: the compressed model.
            dtype: of the result. Default: the model's own.

        Raises:
            InputError: text that names no dtype of torch.
        """
        from compresskit.model.swap import densify

        wanted: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
            raise InputError(f"dtype {dtype!r}: give a floating point dtype of torch, such as torch.float16")
        densify(model)
        self.remove_quantization_config(model)
        return model if wanted is None else model.to(wanted)


def _check_devices(model: PreTrainedModel) -> None:
    """A tied head computes with another module's factors: hooks that bring offloaded weights back do not reach it.

    Raises:
        InputError: ``device_map`` puts the parts of a model with such a head in several places.
    """
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    tied = any(isinstance(module, TiedHead) for module in model.modules())
    if tied and (len(places) > 1 or "disk" in places):
        raise InputError(
            f"device_map puts the model on {', '.join(sorted(places))}, but its output head computes with the factors "
            "of its word embedding: give one device"
        )


def _initialise_new(layer: FactorisedLinear, spread: float) -> None:
    """A layer of a head or pooler that the checkpoint lacks: random factors whose product has the usual spread."""
    new = {name: p for name, p in layer.named_parameters() if not is_read(p)}
    if layer.bias is not None and "bias" in new:
        torch.nn.init.zeros_(new.pop("bias"))
    if new:
        with torch.no_grad():
            for factor in new.values():
                torch.nn.init.normal_(factor)
            next(iter(new.values())).mul_(spread / layer.dense_weight().std())


def attach(model: PreTrainedModel, quantizer: CompresskitHfQuantizer) -> None:
    """Mark a model as ours, so that ``save_pretrained``, ``dequantize`` and Trainer treat it right."""
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
    # Factors are ordinary floating point parameters: .half(), .float() and training need no special care.
    model.is_quantized = False  # type: ignore[assignment]
    model.__dict__["save_pretrained"] = partial(_save, model)
    from transformers import PreTrainedModel

    from compresskit.model.targets import word_embedding

    for part in model.modules():  # the base model inside is one too
        embedding = word_embedding(part) if isinstance(part, PreTrainedModel) else None
        if isinstance(embedding, FactorisedEmbedding):
            part.__dict__["resize_token_embeddings"] = partial(_keep_size, embedding)


def _save(model: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
    """In place of ``save_pretrained``, which asks the quantizer for tensors and forgets the ``state_dict`` that it was
    given: those of a sharded model, or of a mean over training.
    """
    saved = inspect.signature(type(model).save_pretrained).bind(model, *arguments, **options)
    quantizer = quantizer_of(model)
    quantizer.given = saved.arguments.get("state_dict")
    try:
        return type(model).save_pretrained(*saved.args, **saved.kwargs)
    finally:
        quantizer.given = None


def _keep_size(
    embedding: FactorisedEmbedding, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any
) -> FactorisedEmbedding:
    """In place of ``resize_token_embeddings``: a factorised table keeps its size.

    Raises:
        InputError: another size is asked for.
    """
    rows = embedding.num_embeddings
    if new_num_tokens not in (None, rows) or rows % (pad_to_multiple_of or 1):
        raise InputError(
            f"the word embedding is factorised, so its {rows} rows cannot become {new_num_tokens or 'more'}: "
            "add tokens to the dense model and compress that, or make this one dense first (compresskit.to_dense)"
        )
    return embedding


def is_compressed(model: PreTrainedModel) -> bool:
    """Whether compresskit compressed the model."""
    return isinstance(getattr(model, "hf_quantizer", None), CompresskitHfQuantizer)


def quantizer_of(model: PreTrainedModel) -> CompresskitHfQuantizer:
    """The quantizer of a compressed model. Raises InputError if the model is not compressed."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, CompresskitHfQuantizer):
        raise InputError(f"{type(model).__name__} is not compressed by compresskit")
    return quantizer


def mount_config(model: PreTrainedModel, config: CompresskitConfig) -> None:
    """Mount every entry of ``config`` on a dense model of any class over the same base.

    Raises:
        InputError: a base entry names a module that the model lacks, or a spec does not fit its shape.
    """
    from compresskit.model.sharing import tie, undeclared_ties
    from compresskit.model.swap import mount
    from compresskit.model.targets import base_prefix, find_targets

    prefix = base_prefix(model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = {_full(name, names, prefix): _full(owner, names, prefix) for name, owner in config.shared.items()}
    tie(model, {name: owner for name, owner in ties.items() if name and owner})
    targets = {target.name: target for target in find_targets(model)}
    entries = [(name, entry, True) for name, entry in config.base.items()]
    entries += [(name, entry, False) for name, entry in config.head.items()]
    for name, entry, required in entries:
        entry = dict(entry)
        paths = [prefix * required + path for path in entry.pop("targets", [name])]
        found = [_resolve(targets, path, prefix, model.base_model_prefix) for path in paths]
        if None in found:
            if required:
                raise InputError(f"the checkpoint factorises {name!r}, which {type(model).__name__} does not have")
            continue
        members = tuple(target for target in found if target is not None)
        group = Group(name if len(members) > 1 else members[0].name, members)
        decomposer = _decomposer(str(entry.get("method")))
        spec = decomposer.parse_spec(entry)
        decomposer.check(group, spec)
        mount(model, decomposer, group, spec)
    tie(model, undeclared_ties(model))  # their factors


def _within(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _full(name: str, known: set[str], prefix: str) -> str:
    """A stored name of a parameter under this class; empty where it has none such."""
    return next((each for each in (prefix + name, name, name.removeprefix(prefix)) if each in known), "")


def _decomposer(name: str) -> AnyDecomposer:
    try:
        return registry.get(name)
    except InputError as error:
        raise InputError(f"{error} (the checkpoint needs it: is the package that adds it installed?)") from None


def _resolve(targets: dict[str, Target], name: str, prefix: str, base_model_prefix: str) -> Target | None:
    """A stored name under this class: as it is, with the base model's prefix added, or with it removed."""
    for candidate in (name, prefix + name, name.removeprefix(f"{base_model_prefix}.")):
        if candidate in targets:
            return targets[candidate]
    return None
