"""Sentence vectors: prompt, pooling and the layers behind it are those of sentence-transformers, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODULES, sentence_folder, write_tsv
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, DebertaV2Config, DebertaV2Model

import compresskit
from compresskit import InputError
from compresskit.model.positions import positions
from compresskit.model.sentence_vectors import SentenceModel, pool, read_sentence_model
from compresskit.tasks.loading import load_task
from compresskit.tasks.registry import KINDS

ROWS = [
    ("the film was very good", "the movie was great", 4.2),
    ("a bad plot", "an awful actor", 2.1),
    ("it is so and so but not poor", "it is one", 1.4),
    ("the movie of the actor", "ugly", 0.3),
    ("a nice one and a fine one", "a great film", 3.6),
]
PROMPT = {"prompts": {"q": "the of and "}, "default_prompt_name": "q"}


def score(folder: Path, data: Path, **more: Any) -> float:
    write_tsv(data / "dev.tsv", "sentence1\tsentence2\tscore", [(a, b, str(c)) for a, b, c in ROWS])
    result = compresskit.evaluate(folder, task="stsb-similarity", data=data, device="cpu", **more)
    return float(result.record["scores"]["dev"]["pearson"])


def cosines(folder: Path, vectors: Callable[[Any, Any], Tensor], max_length: int, prompt: str = "") -> float:
    """The score, from vectors that ``vectors(hidden, tokens)`` makes of one text at a time."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for row in ROWS:
            pair = []
            for text in row[:2]:
                tokens = tokenizer(prompt + text, truncation=True, max_length=max_length, return_tensors="pt")
                pair.append(vectors(model(**tokens).last_hidden_state[0], tokens))
            found.append(float(torch.cosine_similarity(*pair, dim=0)))
    return float(np.corrcoef(found, [row[2] for row in ROWS])[0, 1])


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [5.0, 0.0], [9.0, 9.0]]])
    right, left = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 1, 1, 1]])
    expected = {
        "cls": ([1, -2], [3, 4]),
        "max": ([5, 4], [9, 9]),
        "mean": ([3, 2 / 3], [17 / 3, 13 / 3]),
        "mean_sqrt_len_tokens": ([9 / 3**0.5, 2 / 3**0.5], [17 / 3**0.5, 13 / 3**0.5]),
        "weightedmean": ([22 / 6, 6 / 6], [40 / 6, 31 / 6]),
        "lasttoken": ([5, 0], [9, 9]),
    }
    for mode, wanted in expected.items():
        for mask, row in zip((right, left), wanted, strict=True):
            torch.testing.assert_close(pool(hidden, mask, [mode]), torch.tensor([row], dtype=torch.float32))
    assert pool(hidden, right, list(expected)).shape == (1, 12)
    # Without the prompt, here the first real token; weights still count from the start of the text.
    torch.testing.assert_close(pool(hidden, right, ["cls", "mean"], 1), torch.tensor([[3.0, 4, 4, 2]]))
    torch.testing.assert_close(pool(hidden, left, ["cls", "mean"], 1), torch.tensor([[5.0, 0, 7, 4.5]]))
    torch.testing.assert_close(pool(hidden, right, ["weightedmean"], 1), torch.tensor([[21 / 5, 8 / 5]]))


def test_length_and_prompt_of_the_folder_decide(bench_folder: Path, tmp_path: Path) -> None:
    plain = sentence_folder(bench_folder / "model", tmp_path / "plain")
    short = sentence_folder(bench_folder / "model", tmp_path / "short", encoder={"max_seq_length": 5})
    asked = sentence_folder(bench_folder / "model", tmp_path / "asked", general=PROMPT)
    mean = lambda hidden, tokens: hidden.mean(0)  # noqa: E731
    assert score(plain, tmp_path / "data") == pytest.approx(cosines(plain, mean, 40), abs=1e-5)
    assert score(short, tmp_path / "data") == pytest.approx(cosines(short, mean, 5), abs=1e-5)
    assert score(short, tmp_path / "data", max_length=9) == pytest.approx(cosines(short, mean, 9), abs=1e-5)
    with_prompt = cosines(asked, mean, 40, "the of and ")
    assert score(asked, tmp_path / "data") == pytest.approx(with_prompt, abs=1e-5)
    assert abs(with_prompt - score(plain, tmp_path / "data")) > 1e-3

    without = {"pooling_mode": "mean", "include_prompt": False, "embedding_dimension": 48}
    left_out = sentence_folder(bench_folder / "model", tmp_path / "left_out", without, general=PROMPT)
    behind = lambda hidden, tokens: hidden[4:].mean(0)  # noqa: E731  [CLS] and three words
    assert score(left_out, tmp_path / "data") == pytest.approx(cosines(left_out, behind, 40, "the of and "), abs=1e-5)


def test_a_text_is_as_long_as_the_configuration_says(bench_folder: Path, tmp_path: Path) -> None:
    """Also where positions are relative: sentence-transformers reads the number all the same."""
    config = DebertaV2Config(
        vocab_size=499, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=12, relative_attention=True, position_biased_input=False,
    )  # fmt: skip
    model, task = DebertaV2Model(config), load_task("stsb-similarity")
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    assert positions(model) is None
    assert KINDS.get("similarity").length(task, model, tokenizer, None) == 12
    folder = sentence_folder(bench_folder / "model", tmp_path / "long", encoder={"max_seq_length": 30})
    assert KINDS.get("similarity").length(task, model, tokenizer, folder) == 30


def test_the_layers_behind_count(bench_folder: Path, tmp_path: Path) -> None:
    folder = sentence_folder(bench_folder / "model", tmp_path / "dense", behind=("Dense", "Normalize"))
    weight, bias = torch.randn(8, 48), torch.randn(8)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "2_Dense" / "model.safetensors")
    activation = "torch.nn.modules.activation.Tanh"
    settings = {"in_features": 48, "out_features": 8, "bias": True, "activation_function": activation}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    expected = cosines(folder, lambda hidden, _: torch.tanh(weight @ hidden.mean(0) + bias), 40)
    assert score(folder, tmp_path / "data") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pooling": {"pooling_mode": "best"}}, "are pooled by best"),
        ({"pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_new": True}}, "are pooled by pooling_mode_new"),
        ({"behind": ("CNN",)}, "pass through CNN"),
        ({"encoder": {"transformer_task": "fill-mask"}}, "transformer_task 'fill-mask' is not followed"),
        ({"encoder": {"tokenizer_args": {"strip_accents": True}}}, "tokenizer_args.strip_accents True is not followed"),
        ({"encoder": {"query_length": 32}}, "query_length 32 is not followed"),
        ({"general": {"default_prompt_name": "q"}}, "default_prompt_name 'q' is not among its prompts"),
        ({"general": {"similarity_fn_name": "maxsim"}}, "are compared by maxsim"),
        ({"general": {"model_type": "SparseEncoder"}}, "are those of a SparseEncoder"),
    ],
)
def test_what_is_not_followed_is_refused(change: dict[str, Any], says: str, bench_folder: Path, tmp_path: Path) -> None:
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", **change)
    with pytest.raises(InputError, match=says):
        score(folder, tmp_path / "data")


def test_modules_that_are_not_followed_are_refused(bench_folder: Path, tmp_path: Path) -> None:
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", behind=("Dense",))
    with pytest.raises(InputError, match="modules cannot be read"):  # no config.json
        read_sentence_model(folder)
    settings = {"in_features": 48, "out_features": 8, "activation_function": "mine.Gate"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"Dense with the activation mine\.Gate"):
        read_sentence_model(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json of Pooling"):
        read_sentence_model(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "mine.Transformer", "path": ""}]))
    with pytest.raises(InputError, match=r"pass through mine\.Transformer"):
        read_sentence_model(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": f"{MODULES}Transformer", "path": ""}]))
    with pytest.raises(InputError, match="are made by Transformer, not by Transformer and Pooling"):
        read_sentence_model(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("said", [False, True])
def test_a_folder_is_scored_in_its_own_16_bits(
    dtype: torch.dtype, said: bool, bench_folder: Path, tmp_path: Path
) -> None:
    """Which is what sentence-transformers computes in: as AutoModel reads the folder, or as its settings say."""
    name = str(dtype).removeprefix("torch.")
    encoder = {"model_args": {"torch_dtype": name}} if said else None
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", encoder=encoder)
    if not said:
        AutoModel.from_pretrained(folder).to(dtype).save_pretrained(folder)
    model, tokenizer = AutoModel.from_pretrained(folder).to(dtype).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for texts in zip(*((a, b) for a, b, _ in ROWS), strict=True):
        # One batch, the longest text first.
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        tokens = tokenizer([texts[place] for place in order], padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        assert hidden.dtype == dtype
        mask = tokens["attention_mask"][..., None].float()
        vectors = ((hidden.float() * mask).sum(1) / mask.sum(1)).to(dtype).float()  # which similarities are taken in
        found.append(torch.nn.functional.normalize(vectors, dim=1)[np.argsort(order)])
    cosines = (found[0].numpy() * found[1].numpy()).sum(1)
    wanted = np.corrcoef(cosines, [row[2] for row in ROWS])[0, 1]
    assert score(folder, tmp_path / "data") == pytest.approx(wanted, abs=1e-6)
    plain = sentence_folder(bench_folder / "model", tmp_path / "plain")
    assert score(folder, tmp_path / "data") != pytest.approx(score(plain, tmp_path / "data"), abs=1e-6)


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.mark.parametrize(
    "change",
    [
        *({"pooling": {"embedding_dimension": 48, "pooling_mode": mode}} for mode in (*MODES, MODES)),
        {"pooling": {"embedding_dimension": 48, "pooling_mode": MODES, "include_prompt": False}, "general": PROMPT},
        {"encoder": {"max_seq_length": 6, "do_lower_case": True}, "general": {"truncate_dim": 7}},
        *({"general": {"similarity_fn_name": name}} for name in ("dot", "euclidean", "manhattan")),
        *({"encoder": {"model_args": {"torch_dtype": name}}} for name in ("float16", "bfloat16", "auto")),
    ],
)
def test_scores_are_those_of_the_package(change: dict[str, Any], bench_folder: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", **change)
    own = package.SentenceTransformer(str(folder), device="cpu")
    first, second = (own.encode([row[place] for row in ROWS], convert_to_tensor=True) for place in (0, 1))
    expected = np.corrcoef(own.similarity_pairwise(first, second), [row[2] for row in ROWS])[0, 1]
    assert score(folder, tmp_path / "data") == pytest.approx(expected, abs=1e-4)
    ranks = compresskit.evaluate(folder, task="stsb-similarity", data=tmp_path / "data", device="cpu").record["scores"]
    wanted = spearmanr(own.similarity_pairwise(first, second), [row[2] for row in ROWS])[0]
    assert ranks["dev"]["spearman"] == pytest.approx(wanted, abs=1e-4)


def test_distances_between_near_vectors_are_exact() -> None:
    """Expanding the square, as torch does from 26 rows on, cancels where distances are far below lengths."""
    torch.manual_seed(0)
    vectors = 1 + 1e-3 * torch.randn(40, 48)
    exact = -(vectors.double()[:, None] - vectors.double()).norm(dim=2)
    found = SentenceModel(similarity="euclidean").likenesses(vectors, vectors)
    assert torch.allclose(found.double(), exact, rtol=1e-4, atol=1e-7)
