"""Features of a whole data set, exact similarities, and ranks with ties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_linclip.data import clean_text
from helpers.stand_in_data import StandInData, random_data
from linclip_eval.features import best_ranks, extract_features, similarities


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def lengths(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[float(len(caption)), 1.0] for caption in captions])


def unit_rows(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_every_sample_is_embedded_once_in_order():
    data = random_data(11, [1])
    features = extract_features(flat, data, device="cpu")
    assert data.num_read == 11
    assert features.keys == tuple(f"s{i}" for i in range(11))
    expected = torch.cat([flat(batch.images) for batch in data.batches(range(3))])
    expected = torch.nn.functional.normalize(expected, dim=-1)
    assert np.array_equal(features.images, expected.numpy())
    assert features.images.dtype == np.float32
    assert (features.captions, features.texts.shape, features.owners.shape) == ((), (0, 0), (0,))


def test_lines_of_a_text_are_captions_of_its_image():
    captions = ["a dog\n\n  a cat \n", "", "a house\x85\u2028!", " \n&nbsp;", "b"]
    data = StandInData(torch.ones(5, 3, 2, 2), [0, 1, 2, 3, 4], captions, batch_size=2)
    features = extract_features(flat, data, device="cpu", embed_texts=lengths)
    assert features.captions == ("a dog", "  a cat ", "a house\x85\u2028!", "b")
    assert features.owners.tolist() == [0, 0, 2, 4]
    expected = torch.nn.functional.normalize(lengths(list(features.captions)), dim=-1)
    assert np.array_equal(features.texts, expected.numpy())


@given(
    captions=st.lists(st.text(st.characters(exclude_characters="\r\n")), max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_every_line_of_a_text_is_one_caption(captions, end):
    data = StandInData(torch.ones(1, 3, 2, 2), [0], [end.join(captions)])
    features = extract_features(flat, data, device="cpu", embed_texts=lengths)
    assert features.captions == tuple(filter(clean_text, captions))


def test_unreadable_images_are_named_and_owners_point_past_them():
    def encode(images: torch.Tensor) -> torch.Tensor:
        assert len(images), "a model need not accept an empty batch"
        return flat(images)

    data = random_data(10, [2], unreadable=[0, 4, 5, 6, 7])
    features = extract_features(encode, data, device="cpu", embed_texts=lengths)
    assert features.keys == ("s1", "s2", "s3", "s8", "s9")
    assert [image.key for image in features.unreadable] == ["s0", "s4", "s5", "s6", "s7"]
    assert len(features.unreadable_labels) == 5
    assert features.owners.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_features_are_refused_with_an_example(value):
    def broken(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[1, 0] = value
        return rows

    data = random_data(8, [1])
    with pytest.raises(ValueError, match=r"features of 's1' must be finite; those of 1 of 4 are"):
        extract_features(lambda images: broken(flat(images)), data, device="cpu")
    with pytest.raises(ValueError, match="must be finite; those of 1 of"):
        extract_features(flat, data, device="cpu", embed_texts=lambda texts: broken(lengths(texts)))


def test_data_without_a_readable_image_are_refused():
    for data in (random_data(0, [1]), random_data(3, [1], unreadable=[0, 1, 2])):
        with pytest.raises(ValueError, match=r"data \(0 readable images\) must hold at least one"):
            extract_features(flat, data, device="cpu")


@pytest.mark.parametrize("at_once", [1, 50, 333, 10**6])
def test_similarities_do_not_depend_on_the_size_of_pieces(at_once):
    queries, candidates = unit_rows(37, 96, 0), unit_rows(23, 96, 1)
    pieces = list(similarities(queries, candidates, device="cpu", at_once=at_once))
    assert len(pieces) == -(-37 // max(1, at_once // 23))
    cosines = torch.cat([piece for _, piece in pieces])
    # One product at a time, from the last entry on: an order that no matrix product has.
    grid = 2.0**24
    a, b = np.round(queries * grid) / grid, np.round(candidates * grid) / grid
    expected = np.zeros((37, 23))
    for column in range(95, -1, -1):
        expected += a[:, column, None].astype(float) * b[None, :, column].astype(float)
    assert np.array_equal(cosines.numpy(), expected)
    np.testing.assert_allclose(expected, queries.astype(float) @ candidates.T, atol=1e-6)


def test_ranks_by_hand():
    scores = torch.tensor(
        [
            [0.1, 0.9, 0.5, 0.5],
            [0.5, 0.5, 0.5, 0.5],
            [0.5, 0.5, 0.5, 0.5],
            [0.4, 0.1, 0.3, 0.2],
            [0.4, 0.1, 0.3, 0.2],
            [-math.inf, 0.1, -math.inf, 0.2],
        ]
    )
    relevant = torch.tensor(
        [
            [False, False, False, True],  # after 0.9 and the earlier 0.5
            [False, False, True, True],  # the first of two relevant ones among equals
            [True, False, False, True],
            [False, True, False, True],  # 0.2 is the best relevant score
            [False, False, False, False],
            [True, False, True, False],  # never retrieved
        ]
    )
    assert best_ranks(scores, relevant).tolist() == [3, 3, 1, 3, 5, 5]
