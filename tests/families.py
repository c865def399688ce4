"""The families that are tested, each small and random. `docs/compatibility.md` lists them: `python tests/families.py`
prints its table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedModel

from compresskit.model.positions import positions

#: Names in which most configurations agree; a family changes or drops some.
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
#: Of most families; the others name their classes.
HEADS = {
    "encoder": transformers.AutoModel,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "classifier": transformers.AutoModelForSequenceClassification,
    "tokens": transformers.AutoModelForTokenClassification,
    "answers": transformers.AutoModelForQuestionAnswering,
    "choice": transformers.AutoModelForMultipleChoice,
}


def _boxes(ids: Tensor) -> dict[str, Tensor]:
    return {"bbox": torch.zeros(*ids.shape, 4, dtype=torch.long)}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config: name of the configuration class.
        changes: to :data:`SIZES`; what is None is dropped from them.
        classes: of families that the Auto classes do not map, or map to a decoder.
        inputs: what the model reads beside token ids.
        idle: pattern of layers that token ids alone do not train.
        only: heads that are tested, where others are none of text alone.
        tokens: of a sequence.
    """

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    inputs: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    idle: str = "pooler"
    only: tuple[str, ...] = tuple(HEADS)
    tokens: int = 12

    def heads(self) -> list[str]:
        """What :meth:`build` takes."""
        if self.classes:
            return list(self.classes)
        config = getattr(transformers, self.config)
        return [head for head, auto in HEADS.items() if config in auto._model_mapping and head in self.only]

    def build(self, head: str) -> PreTrainedModel:
        """A random model."""
        sizes = {key: value for key, value in (SIZES | self.changes).items() if value is not None}
        config = getattr(transformers, self.config)(**sizes)
        torch.manual_seed(0)
        model: PreTrainedModel = (
            getattr(transformers, head)(config) if self.classes else HEADS[head].from_config(config)
        ).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start as zeros, which would hide a lost one
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    def batch(self, head: str, rows: int = 2, tokens: int | None = None) -> dict[str, Tensor]:
        """Random token ids and what else the model reads."""
        vocabulary = self.changes.get("vocab_size", SIZES["vocab_size"])
        ids = torch.randint(5, vocabulary, (rows, tokens or self.tokens), generator=torch.Generator().manual_seed(1))
        ids = torch.stack([ids, ids.flip(0)], 1) if head == "choice" else ids
        return {"input_ids": ids, **self.inputs(ids)}


_DEBERTA = {"pooler_hidden_size": 32, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_XLM = {
    **dict.fromkeys(SIZES),
    "vocab_size": 160,
    "emb_dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_langs": 1,
    "max_position_embeddings": 40,
    "pad_index": 0,
    "pad_token_id": 0,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Family] = {
    "albert": Family("AlbertConfig", {"embedding_size": 16, "num_hidden_layers": 2}),
    "aimv2 text": Family("Aimv2TextConfig", classes=("Aimv2TextModel",)),
    "align text": Family("AlignTextConfig", classes=("AlignTextModel",)),
    "altclip text": Family("AltCLIPTextConfig", {"project_dim": 32}, classes=("AltCLIPTextModel",)),
    "bert": Family("BertConfig"),
    "bert-generation": Family("BertGenerationConfig", classes=("BertGenerationEncoder",)),
    "big_bird": Family("BigBirdConfig", {"block_size": 4, "num_random_blocks": 1}),
    "blip text": Family(
        "BlipTextConfig", {"encoder_hidden_size": 32, "is_decoder": False}, ("BlipTextModel",), idle="pooler|crossatt"
    ),
    "bros": Family("BrosConfig", {"hidden_size": 64, "num_attention_heads": 2}, inputs=_boxes),
    "camembert": Family("CamembertConfig"),
    "chinese_clip text": Family("ChineseCLIPTextConfig", classes=("ChineseCLIPTextModel",)),
    "clap text": Family("ClapTextConfig", {"projection_dim": 32}, ("ClapTextModel", "ClapTextModelWithProjection")),
    "clip text": Family("CLIPTextConfig", {"projection_dim": 32}, ("CLIPTextModel", "CLIPTextModelWithProjection")),
    "clipseg text": Family("CLIPSegTextConfig", classes=("CLIPSegTextModel",)),
    "convbert": Family("ConvBertConfig", {"embedding_size": 16}),
    "data2vec-text": Family("Data2VecTextConfig"),
    "deberta": Family("DebertaConfig", {**_DEBERTA, "max_relative_positions": 20}),
    "deberta-v2": Family("DebertaV2Config", {**_DEBERTA, "position_buckets": 8, "max_relative_positions": 20}),
    "deberta-v3": Family(
        "DebertaV2Config",
        {**_DEBERTA, "position_buckets": 8, "max_relative_positions": 20, "position_biased_input": False},
    ),
    "distilbert": Family(
        "DistilBertConfig",
        {
            **dict.fromkeys(SIZES),
            "vocab_size": 160,
            "dim": 32,
            "n_layers": 1,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 40,
        },
    ),
    "dpr": Family("DPRConfig", classes=("DPRQuestionEncoder", "DPRContextEncoder", "DPRReader")),
    "electra": Family("ElectraConfig", {"embedding_size": 16}),
    "embedding_gemma2": Family("EmbeddingGemma2TextConfig", _GEMMA, classes=("EmbeddingGemma2TextModel",)),
    "ernie": Family("ErnieConfig"),
    "esm": Family("EsmConfig", {"position_embedding_type": "rotary", "mask_token_id": 4}),
    "esmc": Family("EsmcConfig"),
    "eurobert": Family("EuroBertConfig", {"num_key_value_heads": 4, "head_dim": 8}),
    "flaubert": Family("FlaubertConfig", _XLM),
    "flava text": Family("FlavaTextConfig", classes=("FlavaTextModel",)),
    "fnet": Family("FNetConfig"),
    "funnel": Family(
        "FunnelConfig",
        {
            **dict.fromkeys(SIZES),
            "vocab_size": 160,
            "d_model": 32,
            "d_head": 8,
            "n_head": 4,
            "d_inner": 64,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        only=("masked-lm", "classifier", "tokens", "answers", "choice"),
    ),
    "gemma3 (bidirectional)": Family(
        "Gemma3TextConfig",
        {**_GEMMA, "use_bidirectional_attention": True, "layer_types": ["full_attention"]},
        ("Gemma3TextModel", "Gemma3TextForSequenceClassification"),
    ),
    "groupvit text": Family("GroupViTTextConfig", classes=("GroupViTTextModel",)),
    "gte": Family("GteConfig"),
    "jina_embeddings_v3": Family("JinaEmbeddingsV3Config"),
    "layoutlm": Family("LayoutLMConfig", {"max_2d_position_embeddings": 32}),
    "layoutlmv3": Family(
        "LayoutLMv3Config",
        {"max_2d_position_embeddings": 32, "coordinate_size": 4, "shape_size": 8, "visual_embed": False},
        inputs=_boxes,
    ),
    "lilt": Family(
        "LiltConfig",
        {"hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 32},
        inputs=_boxes,
        idle="pooler|layout",
    ),
    "longformer": Family(
        "LongformerConfig",
        {"attention_window": 4},
        idle=r"pooler|self\.(query|key|value)",
        only=("encoder", "masked-lm", "classifier", "tokens"),
    ),
    "longt5 encoder": Family("LongT5Config", {**_T5, "local_radius": 4}, ("LongT5EncoderModel",)),
    "luke": Family("LukeConfig", {"entity_vocab_size": 20, "entity_emb_size": 16}, idle="pooler|e2|2e|entity"),
    "markuplm": Family(
        "MarkupLMConfig",
        {
            "max_depth": 5,
            "tag_pad_id": 3,
            "subs_pad_id": 3,
            "max_xpath_tag_unit_embeddings": 5,
            "max_xpath_subs_unit_embeddings": 5,
            "xpath_unit_hidden_size": 8,
        },
    ),
    "megatron-bert": Family("MegatronBertConfig"),
    "metaclip_2 text": Family(
        "MetaClip2TextConfig", {"projection_dim": 32}, ("MetaClip2TextModel", "MetaClip2TextModelWithProjection")
    ),
    "mobilebert": Family(
        "MobileBertConfig", {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    ),
    "modernbert": Family("ModernBertConfig", {"global_attn_every_n_layers": 1}),
    "mpnet": Family("MPNetConfig"),
    "mra": Family("MraConfig", {"block_per_row": 1, "max_position_embeddings": 64}, idle="pooler|attention", tokens=64),
    "mt5 encoder": Family("MT5Config", _T5, ("MT5EncoderModel", "MT5ForTokenClassification")),
    "nomic_bert": Family("NomicBertConfig"),
    "nystromformer": Family("NystromformerConfig", {"num_landmarks": 4, "segment_means_seq_len": 4}),
    "owlv2 text": Family("Owlv2TextConfig", classes=("Owlv2TextModel",)),
    "owlvit text": Family("OwlViTTextConfig", classes=("OwlViTTextModel",)),
    "rembert": Family("RemBertConfig", {"input_embedding_size": 16, "output_embedding_size": 24}),
    "roberta": Family("RobertaConfig"),
    "roberta-prelayernorm": Family("RobertaPreLayerNormConfig"),
    "roc_bert": Family(
        "RoCBertConfig",
        {
            "pronunciation_embed_dim": 16,
            "pronunciation_vocab_size": 160,
            "shape_embed_dim": 16,
            "shape_vocab_size": 160,
        },
    ),
    "roformer": Family("RoFormerConfig", {"embedding_size": 16}),
    "siglip text": Family("SiglipTextConfig", {"projection_size": 32}, ("SiglipTextModel",), idle="head"),
    "siglip2 text": Family("Siglip2TextConfig", {"projection_size": 32}, ("Siglip2TextModel",), idle="head"),
    "splinter": Family("SplinterConfig", idle="qass"),
    "squeezebert": Family("SqueezeBertConfig", {"embedding_size": 32, "vocab_size": 1499}),
    "switch_transformers encoder": Family(
        "SwitchTransformersConfig",
        {**_T5, "num_sparse_encoder_layers": 1, "num_layers": 2, "num_experts": 2},
        ("SwitchTransformersEncoderModel",),
        idle="expert",
    ),
    "t5 encoder": Family("T5Config", _T5, ("T5EncoderModel", "T5ForTokenClassification")),
    "tapas": Family("TapasConfig", {"type_vocab_sizes": [3, 20, 20, 2, 20, 10, 10]}),
    "ultrabert": Family("UltrabertConfig", only=("encoder", "classifier", "tokens", "answers")),
    "umt5 encoder": Family("UMT5Config", _T5, ("UMT5EncoderModel", "UMT5ForTokenClassification")),
    "xclip text": Family("XCLIPTextConfig", classes=("XCLIPTextModel",)),
    "xlm": Family("XLMConfig", _XLM),
    "xlm-roberta": Family("XLMRobertaConfig"),
    "xlm-roberta-xl": Family("XLMRobertaXLConfig"),
    "xlnet": Family(
        "XLNetConfig",
        {
            **dict.fromkeys(SIZES),
            "vocab_size": 160,
            "d_model": 32,
            "n_layer": 1,
            "n_head": 4,
            "d_inner": 64,
        },
    ),
    "xmod": Family("XmodConfig", {"languages": ["en_XX"], "default_language": "en_XX"}),
    "yoso": Family("YosoConfig", {"use_expectation": True}),
}

#: What is refused with one line, and a word of it.
REFUSED: dict[str, tuple[Family, str]] = {
    "canine": (
        Family("CanineConfig", {"num_hash_buckets": 64, "local_transformer_stride": 4, "downsampling_rate": 4}),
        "no word embedding",
    ),
    "gemma3 (causal)": (
        Family("Gemma3TextConfig", {**_GEMMA, "layer_types": ["full_attention"]}, ("Gemma3TextModel",)),
        "decoder",
    ),
    "gpt2": (
        Family("GPT2Config", {**dict.fromkeys(SIZES), "n_embd": 32, "n_layer": 1, "n_head": 4}, ("GPT2Model",)),
        "decoder",
    ),
    "ibert": (Family("IBertConfig"), "QuantEmbedding"),
    "lxmert": (Family("LxmertConfig", {"l_layers": 1, "x_layers": 1, "r_layers": 1}), "token ids alone"),
    "perceiver": (
        Family("PerceiverConfig", {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1}),
        "word embedding",
    ),
    "reformer": (
        Family(
            "ReformerConfig",
            {
                "attention_head_size": 8,
                "axial_pos_shape": [4, 4],
                "axial_pos_embds_dim": [16, 16],
                "feed_forward_size": 64,
                "max_position_embeddings": 16,
                "attn_layers": ["local"],
                "local_attn_chunk_length": 4,
                "num_hashes": 1,
                "num_buckets": 2,
                "is_decoder": False,
            },
        ),
        "token ids alone",
    ),
    "t5 (encoder and decoder)": (Family("T5Config", _T5, ("T5Model",)), "decoder"),
    "tipsv2 text": (Family("Tipsv2TextConfig", classes=("Tipsv2TextModel",)), "token ids alone"),
}


def table() -> str:
    """What `docs/compatibility.md` says of the families, as Markdown."""
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
    version = re.search(r"^transformers==(\S+)", pins, re.MULTILINE)
    assert version is not None
    rows = [
        f"| family (transformers {version[1]}) | tested as | reloads as AutoModel | longest text |",
        "|" + " --- |" * 4,
    ]
    for name, family in FAMILIES.items():
        model = family.build(family.heads()[0])
        auto = "yes" if type(model.config) in MODEL_MAPPING else "transformers has none"
        limit = "table of positions" if positions(model) else "any"
        rows.append(f"| {name} | {', '.join(family.heads())} | {auto} | {limit} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
