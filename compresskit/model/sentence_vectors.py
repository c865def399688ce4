"""Vectors of sentences as sentence-transformers makes them: prompt, pooling and the layers behind, read from a folder.

What a folder asks for beyond that is refused, so that no vector differs from sentence-transformers' own unseen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import normalizers
from torch import Tensor, nn

from compresskit.errors import InputError, one_line
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import positions
from compresskit.model.sentence import CONFIG, MODULES, TRANSFORMER_FILES, module_folders
from compresskit.model.tokenizer import is_fast
from compresskit.model.weights import read_headers, read_tensor
from compresskit.validation import read_json

#: Names of the ways to pool, with the switch that stood for each before version 6, in the order of concatenation.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_MODES = tuple(_SWITCHES.values())
#: Keys of the encoder's settings, each with the value that changes nothing; other keys must have no value.
_PLAIN = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
#: Of these arguments, those that do not change what is computed.
_HARMLESS = {"trust_remote_code", "attn_implementation", "use_safetensors"}
#: Tokens of a text of a model that takes any length.
_NO_LIMIT = 1 << 20
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
#: What a text is to be: some models put another prompt in front of a query than in front of a document.
Role = Literal["text", "query", "document"]


@dataclass(frozen=True)
class SentenceModel:
    """How the vector of a sentence is made of the last hidden states of its tokens.

    Attributes:
        prompt: put in front of every text.
        include_prompt: whether the prompt's tokens are pooled too.
        modes: ways to pool; the vectors of several are put behind each other.
        max_length: tokens of a text with special tokens; None: what tokenizer and model take.
        lower: whether texts are put in lower case first.
        layers: what the pooled vector passes through.
        dtype: what the model computes in; None: what it is stored in.
        size: the first numbers of the vector that are kept; None keeps all.
        similarity: of two vectors, one of :data:`SIMILARITIES`.
    """

    prompt: str = ""
    include_prompt: bool = True
    modes: tuple[str, ...] = ("mean",)
    max_length: int | None = None
    lower: bool = False
    layers: tuple[nn.Module, ...] = ()
    size: int | None = None
    dtype: torch.dtype | None = None
    similarity: str = "cosine"

    def tokenizer(self, tokenizer: Any) -> Any:
        """The tokenizer for the texts: the given one, or a copy of it that puts texts in lower case.

        Raises:
            InputError: it should, and is none of the fast ones.
        """
        if not self.lower:
            return tokenizer
        if not is_fast(tokenizer):
            raise InputError(
                f"{type(tokenizer).__name__} is no fast tokenizer (tokenizer.json), so do_lower_case of the "
                "sentence-transformers model cannot be followed"
            )
        found = copy.deepcopy(tokenizer)
        own = found.backend_tokenizer.normalizer
        steps = [normalizers.Lowercase(), *([own] if own is not None else [])]
        found.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        return found

    def limit(self, model: Any, tokenizer: Any) -> int:
        """Tokens of a text, as sentence-transformers has it: the folder's ``max_seq_length``, else what tokenizer and
        model take.
        """
        said = (self.max_length,) if self.max_length else (tokenizer.model_max_length, _configured(model))
        limits = (_NO_LIMIT, positions(model), *said)
        return int(min(limit for limit in limits if limit is not None))

    def prompt_tokens(self, tokenizer: Any, max_length: int) -> int:
        """How many tokens in front of a text are not pooled."""
        if self.include_prompt or not self.prompt:
            return 0
        ids = tokenizer([self.prompt], truncation=True, max_length=max_length)["input_ids"][0]
        return len(ids) - (ids[-1] in tokenizer.all_special_ids)  # the special token behind it is the text's

    def vectors(
        self, hidden: Tensor, mask: Tensor, prompt_tokens: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(B, T, H) hidden states and their (B, T) attention mask -> (B, size) vectors in float32; gradients pass.

        Like sentence-transformers, pooling adds up in float32 and gives vectors in ``dtype``, that of a model that is
        stored in 16 bits, in which the layers behind it compute too; similarities are then taken in float32.

        Raises:
            InputError: a layer behind the pooling is made for vectors of another length.
        """
        pooled = pool(hidden.float(), mask, self.modes, prompt_tokens).to(dtype)
        for layer in self.layers:
            _check_width(layer, pooled.shape[1])
            pooled = layer.to(pooled.device, dtype)(pooled)
        return pooled[:, : self.size].float()

    def likeness(self, first: Tensor, second: Tensor) -> Tensor:
        """(N,) similarities of (N, size) vectors, row by row; distances count as negative."""
        if self.similarity == "cosine":
            first, second = (nn.functional.normalize(vectors, dim=1) for vectors in (first, second))
            # Summed by numpy, as users of `encode` do: of equal sentences the last digits decide the rank.
            return torch.from_numpy((first.numpy() * second.numpy()).sum(1))
        if self.similarity == "dot":
            return (first * second).sum(1)
        return -torch.linalg.vector_norm(first - second, ord=1 if self.similarity == "manhattan" else 2, dim=1)

    def likenesses(self, first: Tensor, second: Tensor) -> Tensor:
        """(N, M) similarities of (N, size) and (M, size) vectors, every one with every other; as :meth:`likeness`."""
        if self.similarity == "cosine":
            first, second = (nn.functional.normalize(vectors, dim=1) for vectors in (first, second))
        if self.similarity in ("cosine", "dot"):
            return first @ second.T
        # torch's other way expands the square, which cancels where vectors are near each other.
        power = 1.0 if self.similarity == "manhattan" else 2.0
        return -torch.cdist(first, second, p=power, compute_mode="donot_use_mm_for_euclid_dist")


def pool(hidden: Tensor, mask: Tensor, modes: Sequence[str], prompt_tokens: int = 0) -> Tensor:
    """Vectors of sentences, as ``Pooling`` of sentence-transformers computes them.

    Args:
        hidden: (B, T, H).
        mask: (B, T), 1 for real tokens; padding may be on either side.
        modes: of :data:`_MODES`.
        prompt_tokens: real tokens at the start of each row that are left out.

    Returns:
        (B, len(modes) x H).
    """
    first = mask.int().argmax(1, keepdim=True)  # of the real tokens
    place = torch.arange(mask.shape[1], device=mask.device)[None] - first  # 0 for the first real token
    inside = mask.bool() & (place >= prompt_tokens)
    weight = inside[..., None].to(hidden.dtype)
    rows = torch.arange(len(hidden), device=hidden.device)
    found = []
    for mode in modes:
        if mode == "cls":
            found.append(hidden[rows, inside.int().argmax(1)])
        elif mode == "lasttoken":
            last = inside.shape[1] - 1 - inside.int().flip(1).argmax(1)
            last = torch.where(inside.any(1), last, 0)
            found.append((hidden * weight)[rows, last])
        elif mode == "max":
            found.append(hidden.masked_fill(weight == 0, -torch.inf).amax(1))
        elif mode == "weightedmean":
            by_place = weight * (place[..., None] + 1)
            found.append((hidden * by_place).sum(1) / by_place.sum(1).clamp(min=1e-9))
        else:
            count = weight.sum(1).clamp(min=1e-9)
            found.append((hidden * weight).sum(1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count))
    return torch.cat(found, 1)


class _Dense(nn.Module):
    """A linear layer with an activation, and what skips it."""

    def __init__(self, linear: nn.Module, activation: nn.Module, skip: nn.Module | None) -> None:
        super().__init__()
        self.linear, self.activation, self.skip = linear, activation, skip

    def forward(self, x: Tensor) -> Tensor:  # x: (B, in_features) -> (B, out_features)
        out: Tensor = self.activation(self.linear(x))
        return out if self.skip is None else out + self.skip(x)


class _Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # x: (B, H) -> (B, H)
        return nn.functional.normalize(x, dim=-1)


def _check_width(layer: nn.Module, width: int) -> None:
    inner = layer.linear if isinstance(layer, _Dense) else layer
    takes = inner.in_features if isinstance(inner, nn.Linear) else None
    takes = inner.normalized_shape[-1] if isinstance(inner, nn.LayerNorm) else takes
    if takes not in (None, width):
        kind = type(inner).__name__.replace("Linear", "Dense")
        raise InputError(
            f"sentence vectors: the {kind} layer behind the pooling takes {takes} numbers, the vectors there have "
            f"{width}: the layers belong to another model; give this one a {MODULES} of its own, such as one with "
            "Transformer and Pooling alone"
        )


def _configured(model: Any) -> int | None:
    """Tokens that the configuration names, also where positions are relative; None where there are none (XLNet: -1)."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def unsaid(folder: Path | None) -> str | None:
    """A note where a model's folder does not say how sentence vectors are made."""
    if has_sentence_model(folder):
        return None
    where = "the model" if folder is None else f"model {folder.name}: its folder"
    return f"{where} does not say how vectors of texts are made ({MODULES}): the mean over the tokens is taken"


def read_sentence_model(folder: Path | None, role: Role = "text") -> SentenceModel:
    """How the sentence vectors of a checkpoint are made: the mean over the tokens, where its folder does not say.

    Args:
        folder: of the model; None for one given as an object.
        role: which of the folder's prompts is taken: of a ``text`` the one that ``default_prompt_name`` names, of a
            ``query`` or ``document`` the one of this name, none where the folder has none.

    Raises:
        InputError: the folder asks for something that is not followed here, or its modules cannot be read.
    """
    if folder is None or not has_sentence_model(folder):
        return SentenceModel()
    try:
        return _read(folder, role)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        what = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"model {folder}: its sentence-transformers modules cannot be read: {what}") from None


def has_sentence_model(folder: Path | None) -> bool:
    """Whether a folder says how its sentence vectors are made."""
    return folder is not None and (folder / MODULES).is_file()


def prompts(folder: Path) -> tuple[str, ...]:
    """All prompts that a folder names; nothing else of it is looked at. Raises InputError: its file cannot be read."""
    named = read_json(folder / CONFIG, "cannot be read").get("prompts") if (folder / CONFIG).is_file() else None
    return tuple(str(prompt) for prompt in named.values() if prompt) if isinstance(named, dict) else ()


def in_lower_case(folder: Path) -> bool:
    """Whether a folder asks for texts in lower case; nothing else of it is looked at. Raises InputError as above."""
    return bool(_encoder_file(folder)[1].get("do_lower_case", False))


def reader_of_text(checkpoint: Checkpoint, tokenizer: Any) -> Any:
    """The tokenizer with which a checkpoint reads plain text: the given one, in lower case where its folder asks for
    that.

    Raises:
        InputError: the folder's file cannot be read; the tokenizer is no fast one.
    """
    folder = checkpoint.folder
    return SentenceModel(lower=folder is not None and in_lower_case(folder)).tokenizer(tokenizer)


def numbers_behind(folder: Path | None) -> int:
    """How many numbers the layers behind a model's encoder have; 0 where there are none."""
    return sum(read_headers(path).numbers for path in _weighty(folder))


def bytes_behind(folder: Path | None) -> int:
    """Bytes of the weight files of the layers behind a model's encoder."""
    return sum(read_headers(path).size for path in _weighty(folder))


def _weighty(folder: Path | None) -> list[Path]:
    """The modules of a folder that have weights."""
    paths = [] if folder is None else [folder / name for name in module_folders(folder)]
    return [
        path for path in paths if any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    ]


def _read(folder: Path, role: Role) -> SentenceModel:
    modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    kinds = [_kind(folder, module) for module in modules]
    if kinds[:1] != [("Transformer", "")] or [kind for kind, _ in kinds[1:2]] != ["Pooling"]:
        raise _refused(folder, f"are made by {', '.join(kind for kind, _ in kinds)}, not by Transformer and Pooling")
    pooling = _settings(folder, kinds[1][1])
    general = read_json(folder / CONFIG, "cannot be read") if (folder / CONFIG).is_file() else {}
    if general.get("model_type") not in (None, "SentenceTransformer"):
        raise _refused(folder, f"are those of a {general['model_type']}")
    similarity = general.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise _refused(folder, f"are compared by {similarity}")
    max_length, lower, dtype = _encoder(folder)
    size = general.get("truncate_dim")
    return SentenceModel(
        prompt=_prompt(folder, general, role),
        include_prompt=bool(pooling.get("include_prompt", True)),
        modes=_modes(folder, pooling),
        max_length=max_length,
        lower=lower,
        layers=tuple(_layer(folder, kind, path) for kind, path in kinds[2:]),
        size=None if size is None else int(size),
        dtype=dtype,
        similarity=similarity,
    )


def _refused(folder: Path, what: str) -> InputError:
    known = f"{', '.join(_MODES)} pooling, Dense, LayerNorm and Normalize behind it"
    return InputError(f"model {folder}: its sentence vectors {what}, which cannot be scored ({known} can)")


def _kind(folder: Path, module: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and path of a module of sentence-transformers itself."""
    owner, _, kind = str(module["type"]).rpartition(".")
    if owner.partition(".")[0] != "sentence_transformers":
        raise _refused(folder, f"pass through {module['type']}")
    return kind, str(module["path"])


def _settings(folder: Path, path: str) -> dict[str, Any]:
    """``config.json`` of a module; nothing where the module needs none."""
    if path not in module_folders(folder) or not (folder / path / "config.json").is_file():
        return {}
    return read_json(folder / path / "config.json", "cannot be read")


def _modes(folder: Path, pooling: Mapping[str, Any]) -> tuple[str, ...]:
    if not pooling:
        raise _refused(folder, "are pooled in a way that no config.json of Pooling says")
    mode = pooling.get("pooling_mode")
    if mode is None:  # before version 6 there was a switch for every mode
        mode = [name for switch, name in _SWITCHES.items() if pooling.get(switch)] or ["mean"]
    modes = (mode,) if isinstance(mode, str) else tuple(map(str, mode))
    on = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value} - _SWITCHES.keys()
    if strange := sorted(on | (set(modes) - set(_MODES))):
        raise _refused(folder, f"are pooled by {', '.join(strange)}")
    return modes


def _prompt(folder: Path, general: Mapping[str, Any], role: Role) -> str:
    name, prompts = general.get("default_prompt_name"), general.get("prompts") or {}
    if name is not None and name not in prompts and name not in ("query", "document"):  # these two exist and are empty
        raise InputError(f"model {folder}: {CONFIG}: default_prompt_name {name!r} is not among its prompts")
    return str(prompts.get(name if role == "text" else role) or "")


def _encoder(folder: Path) -> tuple[int | None, bool, torch.dtype | None]:
    """Tokens of a text, whether it is put in lower case, and what the encoder computes in, where that is said."""
    name, settings = _encoder_file(folder)
    limit, lower = settings.pop("max_seq_length", None), bool(settings.pop("do_lower_case", False))
    settings.pop("unpad_inputs", None)
    dtype: torch.dtype | None = None
    for arguments in _ARGUMENTS:
        given = dict(settings.pop(arguments, None) or {})
        if arguments in ("model_args", "model_kwargs"):
            dtype = _dtype(given.pop("torch_dtype", None), dtype)
            dtype = _dtype(given.pop("dtype", None), dtype)
        if arguments in ("tokenizer_args", "processor_kwargs"):
            limit = given.pop("model_max_length", limit)
        settings |= {f"{arguments}.{key}": value for key, value in given.items() if key not in _HARMLESS}
    for key, value in settings.items():
        if value not in (None, False, "", [], {}, _PLAIN.get(key)):
            raise InputError(f"model {folder}: {name}: {key} {value!r} is not followed, so it cannot be scored")
    return (None if limit is None else int(limit)), lower, dtype


def _encoder_file(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The settings of the encoder, with the name of their file."""
    name = next((name for name in TRANSFORMER_FILES if (folder / name).is_file()), None)
    return name, read_json(folder / name, "cannot be read") if name is not None else {}


def _dtype(name: Any, otherwise: torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name; None of ``auto``. Raises ValueError."""
    if name is None:
        return otherwise
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if name == "auto" or isinstance(found, torch.dtype):
        return None if name == "auto" else found
    raise ValueError(f"dtype {name!r} is unknown")


def _layer(folder: Path, kind: str, path: str) -> nn.Module:
    settings = _settings(folder, path)
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise _refused(folder, f"pass through {kind} with {key} {settings[key]!r}")
    if kind == "Normalize":
        return _Normalize()
    if kind == "Dropout":  # nothing without training
        return nn.Identity()
    if kind == "Dense":
        return _dense(folder, path, settings)
    if kind == "LayerNorm":
        layer = nn.LayerNorm(int(settings["dimension"]))
        _load(layer, folder / path, "norm.")
        return layer.eval().requires_grad_(False)
    raise _refused(folder, f"pass through {kind}")


def _dense(folder: Path, path: str, settings: Mapping[str, Any]) -> nn.Module:
    inside, outside = int(settings["in_features"]), int(settings["out_features"])
    name = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    module, _, short = str(name).rpartition(".")
    found = getattr(nn, short, None)
    known = module.startswith("torch.nn") and isinstance(found, type) and issubclass(found, nn.Module)
    if not known or found is None:
        raise _refused(folder, f"pass through Dense with the activation {name}")
    linear = nn.Linear(inside, outside, bias=bool(settings.get("bias", True)))
    _load(linear, folder / path, "linear.")
    skip: nn.Module | None = None
    if settings.get("use_residual"):
        skip = nn.Identity()
        if inside != outside:
            skip = nn.Linear(inside, outside, bias=False)
            _load(skip, folder / path, "residual.")
    return _Dense(linear, found(), skip).eval().requires_grad_(False)


def _load(layer: nn.Module, folder: Path, prefix: str) -> None:
    stored = read_headers(folder)
    state = {name: read_tensor(stored, prefix + name).float() for name in layer.state_dict()}
    layer.load_state_dict(state)
