"""Diagnostics: the weights of the layers themselves, known statistics, and the command."""

import csv
import io
import json
import math
import re
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ds_linclip.config import (
    Attention,
    LinearAttention,
    ModelConfig,
    SoftmaxAttention,
    TextTower,
    VisionTower,
)
from ds_linclip.interop.state_dict import export_folder
from ds_linclip.model import CLIP
from ds_linclip.model.attention import SelfAttention
from ds_linclip.parallel.mesh import Mesh
from linclip_eval.diagnostics.attention_statistics import (
    attention_statistics,
    contrast_bound,
    token_similarity,
)
from linclip_eval.diagnostics.figure import draw_diagnostics
from linclip_eval.diagnostics.measure import LayerStatistic, diagnose
from linclip_kernels.linear_attention.reference import linear_attention_reference
from linclip_launch.cli import main

FORMS = {
    "softmax": SoftmaxAttention(),
    "eq4": LinearAttention(normalized=True),
    "eq7": LinearAttention(score_scale=0.25, length_exponent=0.5),
    "quadratic": LinearAttention(feature_map="quadratic", head_norm=True),
}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh.create()


def tiny_clip(mesh: Mesh, attention: Attention, *, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    vision = VisionTower(
        image_size=(16, 16), patch_size=4, width=32, layers=2, head_width=16, attention=attention
    )
    text = TextTower(context_length=16, width=32, heads=2, layers=2, attention=attention)
    model = CLIP(ModelConfig(embed_dim=16, vision=vision, text=text), mesh).eval()
    for module in model.modules():
        if isinstance(module, SelfAttention):  # far from uniform, also with softmax
            module.qkv.weight.data.mul_(4)
    return model


def some_texts() -> Tensor:
    texts = torch.zeros(3, 16, dtype=torch.int64)
    for row, length in enumerate([6, 9, 6]):
        texts[row, :length] = torch.randint(1, 49406, (length,))
        texts[row, length - 1] = 49407
    return texts


def weights_by_formula(attention: SelfAttention, q: Tensor, k: Tensor) -> Tensor:
    """Return float64 weights [B, H, N, N] of softmax, or of the linear-attention reference."""
    num_tokens, form = q.shape[1], attention.settings
    if form.kind == "softmax":
        scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(q.shape[-1])
        if attention.causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        return scores.softmax(dim=-1)
    values = torch.eye(num_tokens).expand(len(q), q.shape[2], -1, -1).transpose(1, 2)
    return linear_attention_reference(
        q,
        k,
        values,
        causal=attention.causal,
        normalized=form.normalized,
        feature_map=form.feature_map,
        score_scale=form.score_scale,
        length_exponent=form.length_exponent,
    ).transpose(1, 2)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_statistics_are_those_of_the_weights_that_make_the_output(mesh, form):
    model = tiny_clip(mesh, FORMS[form])
    images, texts = torch.randn(3, 3, 16, 16), some_texts()[:1, :6]
    seen: list[tuple[SelfAttention, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda m, x, y: seen.append((m, x[0], y)))
    found = diagnose(model, [images[:2], images[2:]], [texts])

    layers = iter([("vision", 1), ("vision", 2)] * 2 + [("text", 1), ("text", 2)])
    expected: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
    for attention, x, output in seen:
        q, k, v = attention.project(x)
        weights = weights_by_formula(attention, q, k)
        o = (weights.float() @ v.transpose(1, 2)).transpose(1, 2)
        o = attention.finish(o, x, v, None)
        assert_close(attention.out_proj(o.flatten(2)), output, rtol=1e-4, atol=1e-5)
        statistics = attention_statistics(weights.flatten(0, 1), causal=attention.causal)
        expected.setdefault(next(layers), []).append(statistics)
    assert len(expected) == 4
    for (tower, layer), parts in expected.items():
        for name in parts[0]:
            values = torch.cat([part[name] for part in parts])
            (row,) = (r for r in found if (r.tower, r.layer, r.statistic) == (tower, layer, name))
            low, high = values.quantile(torch.tensor([0.05, 0.95]).double()).tolist()
            wanted = (values.mean().item(), low, high)
            assert (row.mean, row.low, row.high) == pytest.approx(wanted, rel=1e-5), name


@torch.no_grad()
def test_branch_ratio_is_that_of_the_model_and_of_its_initial_weights(mesh):
    model = tiny_clip(mesh, FORMS["eq7"])
    images, texts = [torch.randn(3, 3, 16, 16)], some_texts()[:1, :6]
    untrained = tiny_clip(mesh, FORMS["eq7"])
    for name, module in untrained.named_modules():
        if isinstance(module, SelfAttention):
            module.qkv.weight.data.div_(4)
            model.get_submodule(name).out_proj.weight.data.mul_(3)

    def rms(x):
        return x.square().mean(dim=(1, 2)).sqrt()

    generator = torch.get_rng_state()
    rows = diagnose(model, images, [texts])
    assert torch.equal(torch.get_rng_state(), generator)
    for source, statistic in ((model, "branch_ratio"), (untrained, "branch_ratio_at_init")):
        expected = []

        def record(block, inputs, _, ratios=expected):
            x = inputs[0]
            ratios.append((rms(block.attn(block.ln_1(x))) / rms(x)).mean().item())

        for block in (*source.visual.blocks.values(), *source.text.blocks.values()):
            block.register_forward_hook(record)
        source.encode_image(images[0])
        source.encode_text(texts)
        found = [row.mean for row in rows if row.statistic == statistic]
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_uniform_attention_has_the_known_numbers(causal):
    weights = torch.full((2, 8, 8), 0.25, dtype=torch.float64)
    weights = weights.tril() if causal else weights
    found = attention_statistics(weights, causal=causal)
    one = torch.ones(2, dtype=torch.float64)
    assert_close(found["entropy"], one)
    assert_close(found["contrast"], one)
    assert_close(found["variation"], 0 * one, atol=1e-7, rtol=0)
    assert_close(found["gain"], one * (0.25 * 4.5 if causal else 2))
    if causal:  # rows differ: a mean over all that came before
        assert 1 / 8 < found["effective_rank"][0] < 1
        assert_close(found["gain_variation"], one * torch.arange(1.0, 9).std(correction=0) / 4.5)
    else:
        assert_close(found["effective_rank"], one / 8)
        assert_close(found["gain_variation"], 0 * one)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_to_oneself_has_the_known_numbers(causal):
    found = attention_statistics(torch.eye(8, dtype=torch.float64)[None], causal=causal)
    mean_num_keys = 5 if causal else 8  # of the rows that see more than one
    assert found["entropy"].item() == pytest.approx(0)
    assert found["effective_rank"].item() == pytest.approx(1)
    assert found["contrast"].item() == pytest.approx(mean_num_keys)
    expected = sum(math.sqrt(n - 1) for n in range(2, 9)) / 7 if causal else math.sqrt(7)
    assert found["variation"].item() == pytest.approx(expected)


def test_factors_of_rows_change_only_the_gain():
    weights = torch.rand(2, 8, 8, dtype=torch.float64)
    factors = torch.rand(2, 8, 1, dtype=torch.float64) + 0.5
    plain, scaled = (
        attention_statistics(w, causal=False)
        for w in (weights.softmax(-1), weights.softmax(-1) * factors)
    )
    for name in ("entropy", "contrast", "variation", "effective_rank"):
        assert_close(plain[name], scaled[name])
    assert_close(scaled["gain"], factors.mean(dim=(1, 2)))
    spread = factors.std(dim=(1, 2), correction=0) / factors.mean(dim=(1, 2))
    assert_close(scaled["gain_variation"], spread)


def test_negative_weights_count_by_their_size():
    signs = torch.tensor([[1.0, 1, 1, -1], [1, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, 1]])
    uniform = attention_statistics(signs[None].double() / 2, causal=False)
    assert uniform["entropy"].item() == pytest.approx(1)
    assert uniform["contrast"].item() == pytest.approx(1)
    assert uniform["variation"].item() == pytest.approx(0, abs=1e-7)
    assert uniform["gain"].item() == pytest.approx((1 + 2 + 1 - 1) / 4)
    assert uniform["negative_share"].item() == pytest.approx((1 / 4 + 0 + 1 / 4 + 3 / 4) / 4)
    assert uniform["effective_rank"].item() > 1 / 4  # uniform weights of one sign have 1 / 4
    row = torch.tensor([[[2.0, -1, 0], [2, -1, 0], [2, -1, 0]]], dtype=torch.float64)
    found = attention_statistics(row, causal=False)
    assert found["contrast"].item() == pytest.approx(2)
    assert found["gain"].item() == pytest.approx(1)


@pytest.mark.parametrize("causal", [False, True])
def test_contrast_of_affine_scores_stays_below_its_bound(causal):
    q, k = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    cosines = torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
    scores = (1 + cosines).tril() if causal else 1 + cosines
    contrast = attention_statistics(scores, causal=causal)["contrast"]
    bound = contrast_bound(q, k, causal=causal)
    assert (contrast < bound).all()
    # One key equals the query and the others cancel: the bound is reached.
    q = torch.tensor([[1.0, 0.0]]).expand(1, 4, 2)
    k = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    found = attention_statistics(1 + q @ k.mT, causal=False)["contrast"]
    assert_close(found, torch.tensor([2.0]))
    assert_close(contrast_bound(q, k, causal=False), torch.tensor([2.0]))


def test_token_similarity_of_equal_orthogonal_and_opposite_tokens():
    token = torch.randn(5)
    equal = token.expand(1, 4, 5) * torch.tensor([0.5, 1, 2, 3])[None, :, None]
    assert_close(token_similarity(equal), torch.ones(1))
    assert_close(token_similarity(torch.eye(4)[None]), torch.zeros(1), atol=1e-6, rtol=0)
    assert_close(token_similarity(torch.stack([token, -token])[None]), -torch.ones(1))


def test_texts_are_cut_after_their_end_of_text_token(mesh):
    model, images, texts = tiny_clip(mesh, FORMS["eq7"]), torch.randn(1, 3, 16, 16), some_texts()
    together = diagnose(model, [images], [texts])
    padded_otherwise = torch.where(texts.argmax(1)[:, None] < torch.arange(16), 7, texts)
    apart = diagnose(model, [images], list(padded_otherwise.split(1)))
    assert [(r.tower, r.layer, r.statistic) for r in together] == [
        (r.tower, r.layer, r.statistic) for r in apart
    ]
    for one, other in zip(together, apart, strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-5), one


def test_large_matrices_are_processed_in_chunks(mesh, monkeypatch):
    model, images = tiny_clip(mesh, FORMS["eq4"]), [torch.randn(3, 3, 16, 16)]
    whole = diagnose(model, images, [some_texts()])
    monkeypatch.setattr("linclip_eval.diagnostics.measure._CHUNK_ELEMENTS", 5 * 17**2)
    assert diagnose(model, images, [some_texts()])[0].mean == pytest.approx(whole[0].mean)


def test_bound_is_reported_for_affine_scores_only(mesh):
    images = [torch.randn(1, 3, 16, 16)]
    for form, attention in FORMS.items():
        found = diagnose(tiny_clip(mesh, attention), images, [some_texts()])
        has_bound = {r.tower for r in found if r.statistic == "contrast_bound"} == {
            "vision",
            "text",
        }
        assert has_bound == (form in ("eq4", "eq7"))


def test_missing_or_invalid_inputs_are_refused(mesh):
    model, images = tiny_clip(mesh, FORMS["eq7"]), [torch.randn(1, 3, 16, 16)]
    with pytest.raises(ValueError, match=r"images \(none\) must hold at least one batch"):
        diagnose(model, [], [some_texts()])
    with pytest.raises(ValueError, match=r"texts \(none\) must hold at least one batch"):
        diagnose(model, images, [])
    with pytest.raises(ValueError, match=r"sequence \(17 tokens\) must have 2 to 16 tokens"):
        diagnose(model, images, [some_texts()], max_tokens=16)
    model.visual.blocks["1"].attn.qkv.weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"attention \(layer 2\) must be finite"):
        diagnose(model, images, [some_texts()])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def hub_folders(mesh, tmp_path_factory) -> list[Path]:
    folders = []
    for form in ("softmax", "eq7"):
        folders.append(tmp_path_factory.mktemp("models") / form)
        export_folder(tiny_clip(mesh, FORMS[form]), folders[-1])
    return folders


def write_data(folder: Path, *, captions: bool) -> Path:
    folder.mkdir()
    (folder / "classnames.txt").write_text("red\ngreen\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} image\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for place in range(5):
            image = io.BytesIO()
            Image.radial_gradient("L").rotate(30 * place).convert("RGB").save(image, format="PNG")
            members = {"png": image.getvalue(), "cls": b"1"}
            if captions:
                members["txt"] = f"picture number {place}".encode()
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{place:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("captions", [True, False])
def test_command_compares_models(hub_folders, tmp_path, capsys, captions):
    data, out = write_data(tmp_path / "data", captions=captions), tmp_path / "out"
    models = [f"softmax={hub_folders[0]}", str(hub_folders[1])]
    arguments = ["eval", "diagnostics", *models, "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--num-images", "4"]) == 0
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"softmax", "eq7"}
    results = json.loads((out / "results.json").read_text())
    assert len(rows) == sum(len(found) for found in results["models"].values())
    summary = (out / "summary.md").read_text()
    assert f"4 images of `{data}` and {4 if captions else 2} texts" in summary
    assert "| Eq. 7, scale 0.25, n^-0.5 |" in summary
    for tower in summary.split("## ")[1:]:
        assert re.search(r"\| branch over residual( at init)? \| \d+\.\d\d", tower)
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert summary in capsys.readouterr().out


def test_command_refuses_invalid_arguments(hub_folders, tmp_path, capsys):
    data = write_data(tmp_path / "data", captions=True)
    model = str(hub_folders[0])
    for models, options, message in [
        (["ViT-S-32"], [], "error: model (ViT-S-32) must be ds_linclip's, or a hub folder"),
        ([model, model], [], f"error: models ({model} {model}) must have different labels"),
        ([model], ["--max-tokens", "9"], f"error: model ({model}): sequence (17 tokens) must have"),
    ]:
        out = tmp_path / "out"
        assert (
            main(["eval", "diagnostics", *models, "--data", str(data), "--out", str(out), *options])
            == 2
        )
        assert capsys.readouterr().err.startswith(message)
        assert not out.exists()


def test_figure_has_a_line_for_every_model():
    found = [
        LayerStatistic(tower=tower, layer=layer, statistic=name, mean=0.5, low=0.4, high=0.6)
        for tower in ("vision", "text")
        for layer in (1, 2)
        for name in ("entropy", "contrast", "contrast_bound", "branch_ratio_at_init")
    ]
    figure = draw_diagnostics({"one": found, "two": found})
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes[:8]}
    assert len(figure.axes) == 16
    solid = [
        line for line in panels["Entropy of a row, over log n"].lines if line.get_linestyle() == "-"
    ]
    assert [list(line.get_xdata()) for line in solid] == [[1, 2], [1, 2]]
    dashed = [
        line for line in panels["Largest over mean weight"].lines if line.get_linestyle() == "--"
    ]
    assert len(dashed) == 2
    branch = panels["Attention branch over residual"].lines
    assert [line.get_linestyle() for line in branch if len(line.get_xdata())] == ["--", "--"]
    (legend,) = figure.legends
    assert {"one", "two"} <= {text.get_text() for text in legend.get_texts()}
