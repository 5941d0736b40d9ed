"""Zero-shot classification against open_clip's own, on one rank and on three."""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_linclip.data import UnreadableImage
from ds_linclip.parallel.spawn import run_ranks
from linclip_eval.commands.zero_shot import per_class_table
from linclip_eval.zero_shot.class_lists import ClassList
from linclip_eval.zero_shot.classifier import build_classifier, parse_template
from linclip_eval.zero_shot.evaluate import ZeroShotResult, stable_topk, zero_shot

CLASSNAMES = [
    *("tench", "goldfish", "great white shark", "hammerhead", "electric ray", "stingray"),
    *("rooster", "hen", "ostrich", "brambling", "goldfinch", "house finch", "junco", "indigo"),
]
CLASSES = ClassList.of_names("fish and birds", CLASSNAMES)
TEMPLATES = ["a photo of a {}.", "a blurry scan of the {}.", "itap of my {}."]
NUM_SAMPLES = 40


@dataclass(kw_only=True)
class Batch:
    images: Tensor
    labels: Tensor
    keys: list[str]
    captions: list[str]
    unreadable_labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    unreadable: list[UnreadableImage] = field(default_factory=list)


class Images:
    """A set of given batches that records which of them were read."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self.num_batches = len(batches)
        self.read_numbers: list[int] = []

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        for number in numbers:
            self.read_numbers.append(number)
            yield self._batches[number]


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


def samples(count: int = NUM_SAMPLES, batch_size: int = 8) -> list[Batch]:
    """The first ``count`` samples of one fixed random set, in batches."""
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.randn(NUM_SAMPLES, 3, 8, 8, generator=generator)
    labels = torch.randint(len(CLASSNAMES), (NUM_SAMPLES,), generator=generator)
    spans = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    return [
        Batch(
            images=images[span],
            labels=labels[span],
            keys=[f"{k:09d}" for k in range(span.start, span.stop)],
            captions=[f"caption {k}" for k in range(span.start, span.stop)],
        )
        for span in spans
    ]


def classifier_of(model, templates=TEMPLATES, texts=CLASSES.texts, **options) -> Tensor:
    return build_classifier(
        model.encode_text, texts, templates, tokenizer=tokenizer(), device="cpu", **options
    )


def score(batches: Sequence[Batch], **options) -> ZeroShotResult:
    model = tiny_clip()
    return zero_shot(model.encode_image, classifier_of(model), Images(batches), CLASSES, **options)


def score_fixed(logits: Tensor, labels: list[int], classes=None, **options) -> ZeroShotResult:
    """Score samples whose image features (here: unit columns) pick rows of ``logits``."""
    classes = classes or ClassList.of_names("all", [f"class {i}" for i in range(logits.shape[1])])
    batch = Batch(
        images=torch.arange(len(labels)),
        labels=torch.tensor(labels),
        keys=[str(i) for i in range(len(labels))],
        captions=[""] * len(labels),
    )
    return zero_shot(
        lambda index: torch.eye(len(logits))[index], logits, Images([batch]), classes, **options
    )


@pytest.fixture(scope="module")
def one_rank() -> ZeroShotResult:
    return score(samples())


def test_classifier_equals_open_clip():
    model = tiny_clip()
    expected = open_clip.build_zero_shot_classifier(model, tokenizer(), CLASSNAMES, TEMPLATES)
    classifier = classifier_of(model)
    assert classifier.shape == (16, len(CLASSNAMES))
    torch.testing.assert_close(classifier, expected, rtol=0, atol=1e-6)


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


def test_several_texts_of_a_class_are_averaged():
    model = tiny_clip()
    texts = [("tench", "tinca tinca", "doctor fish"), ("hen",)]
    classifier = classifier_of(model, texts=texts)
    prompts = [template.format(text) for text in texts[0] for template in TEMPLATES]
    features = model.encode_text(tokenizer()(prompts), normalize=True).mean(dim=0)
    expected = features / features.norm()
    torch.testing.assert_close(classifier[:, 0], expected, rtol=0, atol=1e-6)
    alone = classifier_of(model, texts=[("hen",)])
    torch.testing.assert_close(classifier[:, 1:], alone, rtol=0, atol=1e-6)


def test_cached_classes_are_not_embedded_again(tmp_path):
    model, texts = tiny_clip(), [(f"class {i}",) for i in range(150)]  # three files
    num_prompts: list[int] = []

    class Recorder:
        def encode_text(self, tokens: Tensor) -> Tensor:
            num_prompts.append(len(tokens))
            return model.encode_text(tokens)

    def build(fingerprint: str = "a", templates: Sequence[str] = TEMPLATES) -> Tensor:
        num_prompts.clear()
        return classifier_of(
            Recorder(), templates, texts, cache_dir=tmp_path / "cache", fingerprint=fingerprint
        )

    first = build()
    assert sum(num_prompts) == 150 * 3
    assert torch.equal(build(), first)
    assert not num_prompts
    victim = sorted((tmp_path / "cache").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])  # as after a full disk
    assert torch.equal(build(), first)
    assert sum(num_prompts) in (64 * 3, 22 * 3)
    build(fingerprint="b")
    assert sum(num_prompts) == 150 * 3
    build(templates=TEMPLATES[:2])
    assert sum(num_prompts) == 150 * 2


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
    assert len(nearest) > 5  # otherwise the counts below would not tell predictions apart
    assert one_rank.num_samples == NUM_SAMPLES
    assert (one_rank.topk(1), one_rank.topk(5)) == (correct1 / NUM_SAMPLES, correct5 / NUM_SAMPLES)
    assert 0 < one_rank.topk(1) < one_rank.topk(5) < one_rank.topk(10) < 1


def test_counts_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1.0, 2, 3, 4, 5, 6, 7]]) / 10
    batch = Batch(
        images=torch.tensor([0, 0, 0, 1]),
        labels=torch.tensor([0, 4, 5, 0]),
        keys=list("abcd"),
        captions=list("abcd"),
    )
    result = zero_shot(
        lambda index: torch.eye(2)[index],
        scores,
        Images([batch]),
        ClassList.of_names("letters", list("stuvwxy")),
        num_predictions=2,
    )
    assert result.class_samples.tolist() == [2, 0, 0, 0, 1, 1, 0]
    assert result.class_hits(1).tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert result.class_hits(5).tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert (result.topk(1), result.topk(5), result.topk(10)) == (0.25, 0.5, 1.0)
    assert result.mean_per_class_recall == pytest.approx((0.5 + 0 + 0) / 3)
    assert result.confusions() == [(0, 6, 1), (4, 0, 1), (5, 0, 1)]
    assert result.hierarchical_top1 is None
    second = result.predictions[1]
    assert (second.key, second.caption, second.true_class) == ("b", "b", "w")
    assert second.top_classes == ("s", "t", "u", "v", "w")
    expected = (100 * scores[0]).softmax(dim=0)[:5]
    torch.testing.assert_close(torch.tensor(second.top_probabilities), expected)


def test_classes_of_equal_texts_are_merged():
    classes = ClassList.of_names("cards", ["queen", "bee", "queen", "hive"])
    assert classes.ids == ("queen", "bee", "queen (2)", "hive")
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.0]]).expand(4, 4)
    result = score_fixed(scores, [0, 1, 2, 3], classes)
    assert (result.topk(1), result.merged_topk(1)) == (1 / 4, 2 / 4)
    assert result.merged_topk(2) == 3 / 4


def test_ancestors_of_the_class_count_in_the_hierarchy():
    dog, beagle, cat = "n02084071", "n02088364", "n02121620"
    classes = ClassList(
        name="pets",
        ids=(dog, beagle, cat),
        texts=(("dog",), ("beagle",), ("cat",)),
        is_wordnet=True,
    )
    taken_for_dog = torch.tensor([[0.9, 0.5, 0.1]] * 3)
    result = score_fixed(taken_for_dog, [0, 1, 2], classes)
    assert (result.topk(1), result.hierarchical_top1) == (1 / 3, 2 / 3)
    taken_for_beagle = torch.tensor([[0.5, 0.9, 0.1]] * 3)
    result = score_fixed(taken_for_beagle, [0, 1, 2], classes)
    assert result.hierarchical_top1 == 1 / 3  # a dog is not always a beagle
    assert result.best_constant_answer == (0, 2 / 3)  # "dog" for everything
    assert score_fixed(taken_for_dog, [2, 1, 2], classes).best_constant_answer == (2, 2 / 3)
    assert score_fixed(taken_for_dog, [0]).best_constant_answer is None


def test_unreadable_images_count_as_wrong(caplog):
    batch = samples(8)[0]
    whole = score([batch])
    batch.unreadable_labels = torch.tensor([3, 3])
    batch.unreadable = [
        UnreadableImage(key, "image_cut", f"sample {key} of 0.tar") for key in ("a", "b")
    ]
    result = score([batch])
    assert (result.num_samples, result.unreadable) == (10, tuple(batch.unreadable))
    assert result.topk(10) * 10 == whole.topk(10) * 8
    assert result.merged_topk(10) == result.topk(10)
    assert result.class_samples.sum() == 10
    causes = r"image_cut: 2 \(sample a of 0\.tar, \.\.\.\)"
    assert re.search(rf"2 of 10 images cannot be read \({causes}\) and count as wrong", caplog.text)
    batch.images, batch.labels = batch.images[:0], batch.labels[:0]
    assert score([batch]).topk(10) == 0.0


def test_predictions_are_the_first_samples():
    result = score(samples(), num_predictions=11)
    assert [p.key for p in result.predictions] == [f"{k:09d}" for k in range(11)]
    assert torch.equal(result.predictions[9].image, samples()[1].images[1])
    right = sum(p.true_class == p.top_classes[0] for p in result.predictions)
    assert right == score(samples(11)).class_hits(1).sum()


def test_equal_scores_go_to_the_lower_label():
    result = score_fixed(torch.ones(1, 8), [0])
    assert (result.topk(1), result.topk(5)) == (1.0, 1.0)
    result = score_fixed(torch.ones(8, 8), list(range(8)))
    assert result.class_hits(1).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert result.class_hits(5).tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_stable_topk_equals_a_stable_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 12, (50, 40), generator=generator).float()  # full of equals
    expected = logits.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 5, 40):
        assert torch.equal(stable_topk(logits, k), expected[:, :k])


def test_top5_over_few_classes_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        result = score_fixed(torch.tensor([[0.3, 0.2, 0.1]]), [2], num_predictions=1)
    assert (result.topk(1), result.topk(5)) == (0.0, 1.0)
    assert result.predictions[0].top_classes == ("class 0", "class 1", "class 2")
    assert "top-5 over 3 classes" in caplog.text


@pytest.mark.parametrize("name", ["visual.proj", "text_projection"])
def test_model_with_nan_is_not_scored(name):
    model = tiny_clip()
    dict(model.named_parameters())[name].data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"features of '.+' must be finite; those of \d+ of \d+ "):
        zero_shot(model.encode_image, classifier_of(model), Images(samples()), CLASSES)


def test_per_class_table():
    scores = torch.tensor([[3.0, 2, 1], [1.0, 2, 3]]) / 10
    header, *lines = per_class_table(score_fixed(scores, [0, 0]))
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["name"] for row in rows] == ["class 0", "class 1", "class 2"]
    first, second = rows[:2]
    assert [first[key] for key in ("num_samples", "top1", "top5")] == [2, 0.5, 1.0]
    assert (first["most_confused_with"], first["num_confused"]) == ("class 2", 1)
    assert [second[key] for key in ("num_samples", "top1", "top5")] == [0, None, None]


def test_interrupted_evaluation_resumes(tmp_path):
    batches = samples(batch_size=1)  # three parts
    model = tiny_clip()

    class Interrupted(Images):
        def batches(self, numbers):
            for batch in super().batches(numbers):
                if len(self.read_numbers) > 20:
                    raise OSError("the machine is gone")
                yield batch

    def run(data: Images) -> ZeroShotResult:
        classifier = classifier_of(model)
        return zero_shot(
            model.encode_image, classifier, data, CLASSES, parts_dir=tmp_path / "parts"
        )

    with pytest.raises(ValueError, match="the machine is gone"):
        run(Interrupted(batches))
    rest = Images(batches)
    result = run(rest)
    assert rest.read_numbers == list(range(16, NUM_SAMPLES))
    whole = score(batches)
    assert np.array_equal(result.top, whole.top)
    assert np.array_equal(result.labels, whole.labels)
    for damaged in (b"", b"damaged", bytes(1000)):
        (tmp_path / "parts" / "batches-0000016-0000032.safetensors").write_bytes(damaged)
        again = Images(batches)
        assert np.array_equal(run(again).top, whole.top)
        assert again.read_numbers == list(range(16, 32))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo.", r"template \('a photo.'\) must hold {} or {c}"),
        ("a {name}.", r"template \('a \{name\}.'\) must hold {} or {c}"),
        ("a {} and {}.", "must be a format string"),
        ("a {", "must be a format string"),
        ("lambda c: f'a {c}.'", r"template \(.*\) must be text, not code"),
    ],
)
def test_bad_template_is_named(template, message):
    with pytest.raises(ValueError, match=message):
        classifier_of(tiny_clip(), [TEMPLATES[0], template])


_WORDS = st.text(st.characters(exclude_characters="{}"))


@given(before=_WORDS, after=_WORDS, name=_WORDS, place=st.sampled_from(["{}", "{c}", "{0}"]))
def test_name_takes_its_place_in_any_template(before, after, name, place):
    assert parse_template(f"{before}{place}{after}")(name) == f"{before}{name}{after}"
    with pytest.raises(ValueError, match=r"(?s)template \(.*\) must hold \{\} or \{c\}"):
        parse_template(before + after)


@given(template=st.text(alphabet="{}c! :.[]0ax", max_size=12))
def test_any_template_is_read_or_is_a_value_error(template):
    with suppress(ValueError):
        make = parse_template(template)
        assert make("a dog") != make("")


def test_empty_input_is_refused():
    model = tiny_clip()
    with pytest.raises(ValueError, match=r"classes \(\[\]\) must hold at least one class"):
        classifier_of(model, texts=[])
    with pytest.raises(ValueError, match=r"class 1 must have a text; 2 of 3 have none"):
        classifier_of(model, texts=[("a",), (), (" ",)])
    with pytest.raises(ValueError, match=r"templates \(\[\]\) must hold at least one template"):
        classifier_of(model, [])
    with pytest.raises(ValueError, match=r"data \(0 samples\) must hold at least one sample"):
        score([])
    fewer, classifier = ClassList.of_names("fewer", CLASSNAMES[:-1]), classifier_of(model)
    with pytest.raises(ValueError, match=r"classifier \(\[16, 14\]\) must have one column"):
        zero_shot(model.encode_image, classifier, Images(samples()), fewer)


@pytest.mark.parametrize("label", [-1, len(CLASSNAMES)])
def test_label_without_a_class_is_refused(label):
    batches = samples()
    batches[2].labels[3] = label
    with pytest.raises(ValueError, match=rf"label \({label}\) must be in \[0, 14\)"):
        score(batches)


def _write_results(folder: Path) -> None:
    """Write the results of one of three ranks for the tests below."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    many = [(f"class {i}",) for i in range(150)]
    answers = {
        "result": score(samples(), group=group, num_predictions=2),
        "resumed": score(samples(batch_size=1), group=group, parts_dir=folder / "parts"),
        "classifier": classifier_of(
            tiny_clip(), texts=many, group=group, cache_dir=folder / "classes"
        ),
        "one class": classifier_of(tiny_clip(), texts=[("hen",)], group=group),
    }
    bad = samples()
    bad[2].labels[0] = 99  # the third batch is the third rank's
    for name, batches in {"bad label": bad, "no samples": []}.items():
        try:
            answers[name] = score(batches, group=group)
        except ValueError as error:
            answers[name] = str(error)
    torch.save(answers, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("three_ranks")
    run_ranks(3, _write_results, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(3)]


@pytest.mark.distributed
def test_three_ranks_give_the_result_of_one(three_ranks, one_rank):
    for answers in three_ranks:
        assert np.array_equal(answers["result"].top, one_rank.top)
        assert np.array_equal(answers["result"].labels, one_rank.labels)
        assert np.array_equal(answers["resumed"].labels, one_rank.labels)
    keys = [[p.key for p in answers["result"].predictions] for answers in three_ranks]
    assert keys == [[f"{k:09d}" for k in (i, i + 1)] for i in (0, 8, 16)]


@pytest.mark.distributed
def test_three_ranks_build_the_classifier_of_one(three_ranks):
    whole = classifier_of(tiny_clip(), texts=[(f"class {i}",) for i in range(150)])
    alone = classifier_of(tiny_clip(), texts=[("hen",)])
    for answers in three_ranks:
        assert torch.equal(answers["classifier"], whole)
        assert torch.equal(answers["one class"], alone)  # two ranks have nothing to embed


@pytest.mark.distributed
def test_bad_input_is_refused_on_all_ranks(three_ranks):
    for answers in three_ranks:
        assert answers["bad label"] == (
            "label (99) must be in [0, 14), the classes (on rank 2 of 3)"
        )
        assert answers["no samples"] == "data (0 samples) must hold at least one sample"
