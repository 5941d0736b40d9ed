"""ImageNet's class lists, the names of their classes, and WordNet's hierarchy."""

from collections import Counter

import open_clip
import pytest

from linclip_eval.zero_shot.class_lists import IMAGENET_LISTS, imagenet_classes, is_ancestor

SIZES = {
    "imagenet-22k": 21_841,
    "imagenet-21k-goog": 21_843,
    "imagenet-21k-miil": 11_221,
    "imagenet-21k-miil-w21": 10_450,
    "imagenet-12k": 11_821,
    "imagenet-1k": 1000,
}


@pytest.mark.parametrize("name", IMAGENET_LISTS)
def test_every_list_has_its_size_and_is_below_entity_in_wordnet(name):
    classes = imagenet_classes(name, "lemma")
    assert len(classes) == SIZES[name] == len(set(classes.ids))
    assert all(len(texts) == 1 and texts[0] for texts in classes.texts)
    assert all(is_ancestor("n00001740", of=synset) for synset in classes.ids)  # entity


def test_texts_of_a_class():
    label = imagenet_classes("imagenet-1k", "lemma").ids.index("n01440764")
    texts = {
        policy: imagenet_classes("imagenet-1k", policy).texts[label]
        for policy in ("lemma", "aliases", "definition", "open_clip")
    }
    assert texts["lemma"] == ("tench",)
    assert texts["aliases"] == ("tench", "Tinca tinca")
    assert texts["definition"][0].startswith("tench, freshwater dace-like game fish of Europe")
    assert texts["open_clip"] == (open_clip.IMAGENET_CLASSNAMES[label],) == ("tench",)


def test_number_of_repeated_names():
    lemmas = Counter(imagenet_classes("imagenet-22k", "lemma").texts)
    assert len(lemmas) == 20_099
    assert sum(n for n in lemmas.values() if n > 1) == 3186
    assert lemmas[("queen",)] == 7
    definitions = imagenet_classes("imagenet-22k", "definition").texts
    assert len(set(definitions)) == 21_840  # two gutta-percha trees have the same definition


def test_vague_answer_is_right_for_half_of_imagenet():
    ids = imagenet_classes("imagenet-22k", "lemma").ids
    organism = "n00004475"
    share = sum(is_ancestor(organism, of=synset) for synset in ids) / len(ids)
    assert share == pytest.approx(0.497, abs=5e-4)


def test_hierarchy_is_that_of_wordnet():
    beagle, hound, dog, cat = "n02088364", "n02087551", "n02084071", "n02121620"
    assert is_ancestor(beagle, of=beagle)
    assert is_ancestor(hound, of=beagle)
    assert is_ancestor(dog, of=beagle)
    assert is_ancestor("n01317541", of=dog)  # domestic animal: a dog is under two synsets
    assert is_ancestor("n02083346", of=dog)  # canine
    assert not is_ancestor(beagle, of=dog)
    assert not is_ancestor(cat, of=dog)


def test_list_of_a_file_is_read(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("n02088364\nn01440764\n")
    classes = imagenet_classes(str(path), "lemma")
    assert classes.texts == (("beagle",), ("tench",))
    assert classes.title(1) == "tench"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n02088364\nn99999999\nx\n", r"2 of 3 synsets must be those of ImageNet, first n99999999"),
        ("n02088364\nn02088364\n", "n02088364 must occur only once"),
        ("\n", "must not be empty"),
        ("n02088364\n\nn01440764\n", "line 2 of .* must not be blank"),
        (b"n02088364\nn\xff\n", "must be one of imagenet-22k, .* file.*: line 2 of .* in UTF-8"),
        (None, "must be one of imagenet-22k, .* or a readable file"),
    ],
)
def test_bad_list_is_refused(tmp_path, content, message):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"classes \(.*list\.txt\).*{message}"):
        imagenet_classes(str(path), "lemma")


def test_curated_names_exist_for_1k_only():
    with pytest.raises(
        ValueError, match=r"exist for imagenet-1k, not for classes \(imagenet-12k\)"
    ):
        imagenet_classes("imagenet-12k", "open_clip")
    with pytest.raises(ValueError, match=r"names \(alias\) must be one of lemma, aliases"):
        imagenet_classes("imagenet-1k", "alias")
