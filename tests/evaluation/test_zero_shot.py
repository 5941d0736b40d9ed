"""Zero-shot classification against open_clip's own, on one rank and on three."""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from linclip_eval.zero_shot import ZeroShotResult, build_classifier, write_per_class_csv, zero_shot

CLASSNAMES = [
    *("tench", "goldfish", "great white shark", "hammerhead", "electric ray", "stingray"),
    *("rooster", "hen", "ostrich", "brambling", "goldfinch", "house finch", "junco", "indigo"),
]
TEMPLATES = ["a photo of a {}.", "a blurry scan of the {}.", "itap of my {}."]
NUM_SAMPLES = 40


@dataclass(kw_only=True)
class Batch:
    images: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str]


def tiny_clip() -> open_clip.CLIP:
    """Random weights, spread out so that images differ in their nearest class."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 8},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=16)


def samples(start: int = 0, stop: int = NUM_SAMPLES, batch_size: int = 8) -> list[Batch]:
    """Samples ``start`` to ``stop`` of one fixed random set, in batches."""
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.randn(NUM_SAMPLES, 3, 8, 8, generator=generator)
    labels = torch.randint(len(CLASSNAMES), (NUM_SAMPLES,), generator=generator)
    return [
        Batch(
            images=images[i : min(i + batch_size, stop)],
            labels=labels[i : min(i + batch_size, stop)],
            keys=[f"{k:09d}" for k in range(i, min(i + batch_size, stop))],
            captions=[f"caption {k}" for k in range(i, min(i + batch_size, stop))],
        )
        for i in range(start, stop, batch_size)
    ]


def classifier_of(model: open_clip.CLIP, templates=TEMPLATES, **options) -> Tensor:
    return build_classifier(
        model.encode_text, CLASSNAMES, templates, tokenizer=tokenizer(), device="cpu", **options
    )


def score(batches: list[Batch], **options) -> ZeroShotResult:
    model = tiny_clip()
    options.setdefault("classnames", CLASSNAMES)
    return zero_shot(model.encode_image, classifier_of(model), batches, **options)


def score_fixed(logits: Tensor, labels: list[int], **options) -> ZeroShotResult:
    """Score samples whose image features (here: unit columns) pick rows of ``logits``."""
    names = [f"class {i}" for i in range(logits.shape[1])]
    batch = Batch(
        images=torch.arange(len(labels)),
        labels=torch.tensor(labels),
        keys=[str(i) for i in range(len(labels))],
        captions=[""] * len(labels),
    )
    return zero_shot(
        lambda index: torch.eye(len(logits))[index], logits, [batch], classnames=names, **options
    )


@pytest.fixture(scope="module")
def one_rank() -> ZeroShotResult:
    return score(samples())


def test_classifier_equals_open_clip():
    model = tiny_clip()
    expected = open_clip.build_zero_shot_classifier(model, tokenizer(), CLASSNAMES, TEMPLATES)
    classifier = classifier_of(model)
    assert classifier.shape == (16, len(CLASSNAMES))
    assert torch.equal(classifier, expected)


@pytest.mark.parametrize(
    "templates",
    [
        [template.replace("{}", "{c}") for template in TEMPLATES],
        [lambda name, template=template: template.format(name) for template in TEMPLATES],
        [TEMPLATES[0], lambda name: TEMPLATES[1].format(name), TEMPLATES[2].replace("{}", "{c}")],
    ],
    ids=["clip_benchmark", "callables", "mixed"],
)
def test_every_template_form_gives_the_same_classifier(templates):
    model = tiny_clip()
    assert torch.equal(classifier_of(model, templates), classifier_of(model))


def test_accuracy_equals_open_clip(one_rank):
    """The steps of open_clip_train.zero_shot on open_clip's own features and classifier.

    Restated because its ``accuracy`` takes ``float`` of a one-element array: NumPy 2.4 refuses.
    """
    model = tiny_clip()
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer(), CLASSNAMES, TEMPLATES)
    correct1 = correct5 = 0
    nearest = set()
    with torch.inference_mode():
        for batch in samples():
            image_features = model(image=batch.images)[0]
            logits = 100.0 * image_features @ classifier
            hits = logits.topk(5, 1, True, True)[1].eq(batch.labels[:, None])
            correct1 += int(hits[:, :1].sum())
            correct5 += int(hits.sum())
            nearest |= set(logits.argmax(dim=1).tolist())
    assert len(nearest) > 5  # else the model would be too dull to tell two counts apart
    assert one_rank.num_samples == NUM_SAMPLES
    assert (one_rank.top1, one_rank.top5) == (correct1 / NUM_SAMPLES, correct5 / NUM_SAMPLES)
    assert 0 < one_rank.top1 < one_rank.top5 < 1
    assert one_rank.num_nonfinite == 0


def test_counts_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1.0, 2, 3, 4, 5, 6, 7]]) / 10
    images = torch.tensor([0, 0, 0, 1])
    batch = Batch(
        images=images, labels=torch.tensor([0, 4, 5, 0]), keys=list("abcd"), captions=list("abcd")
    )
    result = zero_shot(
        lambda index: torch.eye(2)[index],
        scores,
        [batch],
        classnames=list("stuvwxy"),
        num_predictions=2,
    )
    assert result.class_samples.tolist() == [2, 0, 0, 0, 1, 1, 0]
    assert result.class_top1.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert result.class_top5.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert (result.top1, result.top5) == (0.25, 0.5)
    assert result.mean_per_class_recall == pytest.approx((0.5 + 0 + 0) / 3)
    second = result.predictions[1]
    assert (second.key, second.caption, second.true_class) == ("b", "b", "w")
    assert second.top_classes == ("s", "t", "u", "v", "w")
    expected = (100 * scores[0]).softmax(dim=0)[:5]
    torch.testing.assert_close(torch.tensor(second.top_probabilities), expected)


def test_predictions_are_the_first_samples():
    result = score(samples(), num_predictions=11)
    assert [p.key for p in result.predictions] == [f"{k:09d}" for k in range(11)]
    assert torch.equal(result.predictions[9].image, samples()[1].images[1])
    right = sum(p.true_class == p.top_classes[0] for p in result.predictions)
    assert right == score(samples(stop=11)).class_top1.sum()


def test_equal_scores_go_to_the_lower_label():
    result = score_fixed(torch.ones(1, 8), [0])
    assert (result.top1, result.top5) == (1.0, 1.0)
    collapsed = torch.ones(8, 8)
    result = score_fixed(collapsed, list(range(8)))
    assert result.class_top1.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert result.class_top5.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_few_classes_are_said(caplog):
    with caplog.at_level(logging.INFO):
        result = score_fixed(torch.tensor([[0.3, 0.2, 0.1]]), [2], num_predictions=1)
    assert (result.top1, result.top5) == (0.0, 1.0)
    assert result.predictions[0].top_classes == ("class 0", "class 1", "class 2")
    assert "top-5 over 3 classes" in caplog.text


def test_nonfinite_logits_count_as_wrong(caplog):
    scores = torch.tensor([[0.9, 0.1], [float("nan"), float("nan")]])
    result = score_fixed(scores, [0, 0])
    assert (result.num_nonfinite, result.class_top1.tolist(), result.top5) == (2, [0, 0], 0.0)
    assert "2 of 2 samples have non-finite logits" in caplog.text


def test_per_class_csv(tmp_path):
    scores = torch.tensor([[3.0, 2, 1], [1.0, 2, 3]]) / 10
    write_per_class_csv(score_fixed(scores, [0, 0]), tmp_path / "per_class.csv")
    with open(tmp_path / "per_class.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["label", "class", "num_samples", "top1", "top5"],
        ["0", "class 0", "2", "0.5", "1.0"],
        ["1", "class 1", "0", "", ""],
        ["2", "class 2", "0", "", ""],
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo.", r"template \('a photo.'\) must hold {} or {c}"),
        ("a {name}.", r"template \('a \{name\}.'\) must be a format string"),
        ("a {} and {}.", "must be a format string"),
        ("a {", "must be a format string"),
    ],
)
def test_bad_template_is_named(template, message):
    with pytest.raises(ValueError, match=message):
        classifier_of(tiny_clip(), [TEMPLATES[0], template])


def test_empty_input_is_refused():
    model = tiny_clip()
    with pytest.raises(ValueError, match=r"classnames \(\[\]\) must hold at least one class"):
        build_classifier(model.encode_text, [], TEMPLATES, tokenizer=tokenizer(), device="cpu")
    with pytest.raises(ValueError, match=r"templates \(\[\]\) must hold at least one template"):
        classifier_of(model, [])
    with pytest.raises(ValueError, match=r"batches \(0 samples\) must hold at least one sample"):
        score([])
    with pytest.raises(ValueError, match=r"classifier \(\[16, 14\]\) must have one column"):
        score(samples(), classnames=CLASSNAMES[:-1])


@pytest.mark.parametrize("label", [-1, len(CLASSNAMES)])
def test_label_without_a_class_is_refused(label):
    batches = samples()
    batches[2].labels[3] = label
    with pytest.raises(ValueError, match=rf"label \({label}\) must be in \[0, 14\)"):
        score(batches)


def _rank_main(rank: int, folder: str) -> None:
    """Everything that is asked of three ranks, written down for the tests below."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    group = dist.group.WORLD
    share = [samples(0, 17), [], samples(17, NUM_SAMPLES)][rank]
    answers = {
        "result": score(share, group=group, num_predictions=2),
        "classifier": classifier_of(tiny_clip(), group=group, classes_per_batch=2),
    }
    bad = samples(0, 9)
    if rank == 2:
        bad[0].labels[0] = 99
    for name, batches in {"bad label": bad, "no samples": []}.items():
        try:
            answers[name] = score(batches, group=group)
        except ValueError as error:
            answers[name] = str(error)
    torch.save(answers, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("three_ranks")
    mp.spawn(_rank_main, args=(str(folder),), nprocs=3)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.distributed
def test_three_unequal_ranks_count_as_one(three_ranks, one_rank):
    for answers in three_ranks:
        result = answers["result"]
        for name in ("class_samples", "class_top1", "class_top5"):
            assert torch.equal(getattr(result, name), getattr(one_rank, name)), name
        assert (result.top1, result.top5) == (one_rank.top1, one_rank.top5)
        assert result.mean_per_class_recall == one_rank.mean_per_class_recall
    keys = [[p.key for p in answers["result"].predictions] for answers in three_ranks]
    assert keys == [["000000000", "000000001"], [], ["000000017", "000000018"]]


@pytest.mark.distributed
def test_classifier_split_over_ranks_is_the_same(three_ranks):
    whole = classifier_of(tiny_clip(), classes_per_batch=2)
    for answers in three_ranks:
        assert torch.equal(answers["classifier"], three_ranks[0]["classifier"])
        torch.testing.assert_close(answers["classifier"], whole, rtol=0, atol=1e-6)


@pytest.mark.distributed
def test_bad_input_is_refused_on_all_ranks(three_ranks):
    for answers in three_ranks:
        assert answers["bad label"] == (
            "data-parallel rank 2: label (99) must be in [0, 14), the number of classnames"
        )
        assert answers["no samples"] == "batches (0 samples) must hold at least one sample"
