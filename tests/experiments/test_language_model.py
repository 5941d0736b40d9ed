"""The language-model study: causal, exact in its bits, and careful with its input."""

import io
import json
import math
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from ds_linclip.config import ParallelConfig
from ds_linclip.parallel.mesh import Mesh
from experiments import language_model
from experiments.associative_recall import IGNORED, RecallTask
from experiments.causal_model import KINDS, CausalModel, ModelShape
from experiments.language_model_report import bits_per_byte
from experiments.language_model_training import (
    TextSettings,
    document_bits,
    measure_speed,
    train_recall,
    train_text,
)
from experiments.text_data import SEPARATOR, VOCABULARY, Corpus, pair_bits, read_corpus
from linclip_kernels.linear_attention import op
from linclip_kernels.linear_attention.reference import relative_rms

SHAPE = ModelShape(width=64, layers=2, heads=2, context=40, vocabulary=VOCABULARY)
TINY = TextSettings(
    width=32,
    layers=1,
    heads=1,
    context=32,
    batch=8,
    steps=60,
    recall_steps=2,
    lr=1e-2,
    contexts=(32, 64),
)
TEXT = "\n\n".join(f"Paragraph {i}: " + "the cat sat on the mat. " * 20 for i in range(60))


def build(kind: str = "softmax", shape: ModelShape = SHAPE, seed: int = 0) -> CausalModel:
    mesh = Mesh.create(ParallelConfig(device="cpu"))
    return CausalModel(shape, KINDS[kind], mesh, seed=seed)


def draw_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_do_not_depend_on_later_tokens(kind):
    model, tokens = build(kind), draw_tokens(2, 40)
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.isclose(before[:, 17:], after[:, 17:]).all(dim=-1).any()


@pytest.mark.parametrize("kind", ["eq4", "eq7"])
def test_attention_token_by_token_with_a_state_is_that_of_the_whole_text(kind):
    model, settings = build(kind).double(), KINDS[kind]
    attention = model.blocks[0].attn
    x = torch.randn(2, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, rows = None, []
    with torch.no_grad():
        q, k, v = attention.project(x)
        for i in range(40):
            row, state = op.linear_attention(
                *(each[:, i : i + 1] for each in (q, k, v)),
                causal=True,
                normalized=settings.normalized,
                feature_map=settings.feature_map,
                score_scale=settings.score_scale,
                length_exponent=settings.length_exponent,
                initial_state=state,
                return_state=True,
            )
            rows.append(row)
        assert relative_rms(torch.cat(rows, dim=1), attention.attend(q, k, v)) < 1e-12


def test_kinds_start_from_the_same_shared_weights():
    softmax, linear, other = build(), build("eq7").state_dict(), build(seed=1).state_dict()
    for name, weight in softmax.state_dict().items():
        assert torch.equal(weight, linear[name])
        assert weight.ndim < 2 or not torch.equal(weight, other[name])


def test_head_is_the_token_embedding():
    model = build()
    table = model.token_embedding.weight
    assert [name for name, p in model.named_parameters() if p.shape == table.shape] == [
        "token_embedding.weight"
    ]
    model(draw_tokens(1, 5)).logsumexp(dim=-1).sum().backward()
    assert (table.grad[SEPARATOR] != 0).any()  # not among the inputs: reached through the head
    with torch.no_grad():
        model.ln_final.weight.zero_()
        model.ln_final.bias.fill_(1.0)
        assert relative_rms(model(draw_tokens(1, 5))[0, 0], table.sum(dim=1)) < 1e-5


def test_bits_of_a_model_that_knows_nothing():
    corpus = Corpus([b"training"], [bytes(range(90)), b"", b"x" * 40])
    sizes = torch.tensor([91, 1, 41], dtype=torch.float64)  # with their separators
    model = build()
    bits = torch.tensor(document_bits(model, corpus, 40, torch.device("cpu")), dtype=torch.float64)
    assert bits.sum() / sizes.sum() == pytest.approx(math.log2(VOCABULARY), abs=0.15)
    torch.nn.init.zeros_(model.token_embedding.weight)
    bits = torch.tensor(document_bits(model, corpus, 40, torch.device("cpu")), dtype=torch.float64)
    assert relative_rms(bits, sizes * math.log2(VOCABULARY)) < 1e-6


def test_bits_of_a_document_by_hand():
    corpus = Corpus([b"training"], [b"one", bytes(range(100, 160))])
    model = build("eq4")
    found = document_bits(model, corpus, 40, torch.device("cpu"))
    document = torch.tensor([SEPARATOR, *b"one", SEPARATOR])
    with torch.no_grad():
        logs = model(document[None, :-1])[0].log_softmax(dim=-1).double()
    by_hand = -sum(logs[i, document[i + 1]].item() for i in range(4)) / math.log(2)
    assert found[0] == pytest.approx(by_hand, rel=1e-5)


def test_windows_predict_every_token_once():
    documents = [b"a", bytes(range(10)), bytes(range(9)), b""]
    rows, owners = Corpus([b"x"], documents).windows(5)
    for number, document in enumerate(documents):
        own = rows[owners == number]
        assert own[0, 0] == SEPARATOR
        targets = own[:, 1:].flatten()
        assert targets[targets >= 0].tolist() == [*document, SEPARATOR]
        inputs = own[:, :-1].flatten()[: len(document) + 1]
        assert inputs.tolist() == [SEPARATOR, *document]


def test_counted_pairs_by_hand():
    corpus = Corpus([b"ab", b"ac"], [b"ab", b"d"])
    whole = 0.05 * VOCABULARY
    # The stream is a, b, separator, a, c, separator: each of its five pairs comes once.
    first = (whole + 1) / 1.05, (whole + 2) / 1.05, (whole + 1) / 1.05
    second = (whole + 1) / 0.05, whole / 0.05
    by_hand = [sum(map(math.log2, each)) for each in (first, second)]
    assert pair_bits(corpus) == pytest.approx(by_hand, rel=1e-9)


def test_training_lowers_the_loss():
    corpus = Corpus([b"the cat sat on the mat. " * 40], [b"the cat sat on the mat. "])
    result = train_text("eq7", 0, TINY, corpus, "cpu")
    assert result["train_loss"] < 0.5 * math.log(VOCABULARY)
    assert sum(result["document_bits"]) < 0.5 * 8 * 24
    again = train_text("eq7", 0, TINY, corpus, "cpu")
    assert again["document_bits"] == result["document_bits"]


def test_recall_sequences():
    task = RecallTask(4, 20, num_keys=6)
    tokens, targets = task.sample(50, torch.Generator().manual_seed(3))
    assert tokens.shape == targets.shape == (50, 20)
    assert tokens.max() < task.vocabulary == 13
    assert task.chance == 0.25
    places = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        given = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(given) == len(set(given.values())) == 4
        assert all(1 <= key <= 6 < value for key, value in given.items())
        asked = {place: row[place] for place in range(8, 20) if row[place]}
        assert sorted(asked.values()) == sorted(given)
        assert {p: wanted[p] for p in asked} == {p: given[key] for p, key in asked.items()}
        assert all(wanted[place] == IGNORED for place in range(20) if place not in asked)
        places |= set(asked)
    assert places == set(range(8, 20))
    other, _ = task.sample(50, torch.Generator().manual_seed(4))
    again, _ = task.sample(50, torch.Generator().manual_seed(3))
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


def test_recall_tasks_that_cannot_be():
    with pytest.raises(ValueError, match=r"pairs \(9\) must not be more than num_keys: take 8"):
        RecallTask(9, 64, num_keys=8)
    with pytest.raises(ValueError, match=r"length \(23\) must hold .* take 24"):
        RecallTask(8, 23, num_keys=8)


def test_answers_before_training_are_guesses():
    right = train_recall("eq4", 16, 0, TINY, "cpu")["right_answers"]
    assert len(right) == 1000
    assert 0 <= min(right) <= max(right) <= 4
    assert sum(right) / 4000 < 0.4


def test_speed_and_memory_are_measured():
    found = measure_speed("softmax", 32, TINY, "cpu")
    assert found["tokens_per_second"] > 0
    assert found["peak_bytes"] >= 0


@pytest.mark.long
def test_command_runs_every_task_in_processes(text, monkeypatch, capsys):
    sizes = {"width": 32, "layers": 1, "heads": 1, "context": 32, "steps": 3, "recall-steps": 3}
    options = [word for name, size in sizes.items() for word in (f"--{name}", size)]
    out = text.parent / "out"
    common = [text, "--held-out-bytes", 3000, "--kinds", "eq7", "--contexts", 32, 64]
    assert launch(monkeypatch, *common, *options, "--out", out) == 0
    records = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    tasks = [(record["task"], record["length"]) for record in records]
    assert tasks[:2] == [("speed", 32), ("speed", 64)]
    assert sorted(tasks[2:]) == [("recall", 16), ("recall", 32), ("text", 0)]
    assert "| eq7 |" in capsys.readouterr().out


def test_interval_of_bits_per_byte_by_hand():
    same = bits_per_byte([16.0, 32.0, 80.0], [8, 16, 40])
    assert (same.mean, same.half_width) == (2.0, 0.0)
    found = bits_per_byte([10.0, 30.0], [10, 10])  # ratio 2, residuals -10 and 10
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(12.706 * math.sqrt(2 * 200) / 20, rel=1e-4)


def test_documents_of_a_text_file_are_joined_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = read_corpus([str(tmp_path / "a.txt")], held_out_bytes=2000)
    documents = [*corpus.training, *corpus.held_out]
    assert all(len(document) >= 1000 for document in documents)
    paragraphs = [p for document in documents for p in document.decode().split("\n\n")]
    assert sorted(paragraphs) == sorted(part for part in TEXT.split("\n\n"))
    assert sum(map(len, corpus.held_out)) >= 2000
    assert corpus.stream.tolist().count(SEPARATOR) == len(corpus.training)


def test_documents_of_a_tar_are_its_captions(tmp_path, caplog):
    captions = [f"caption {i}, größer" for i in range(40)]
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for i, text in enumerate([*(caption.encode() for caption in captions), b"\xff\xfe bad"]):
            for suffix, content in ((".jpg", b"image"), (".txt", text)):
                member = tarfile.TarInfo(f"{i:03}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    corpus = read_corpus([str(tmp_path / "{00..00}.tar")], held_out_bytes=100)
    found = sorted(document.decode() for document in (*corpus.training, *corpus.held_out))
    assert found == sorted(captions)
    assert "left out: text_not_utf8: 1 (040 of" in caplog.text


def test_manual_of_python_says_nothing_twice():
    corpus = read_corpus([], held_out_bytes=65536)
    paragraphs = [p for d in (*corpus.training, *corpus.held_out) for p in d.split(b"\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 5000
    assert read_corpus([], held_out_bytes=65536) == corpus


def launch(monkeypatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["language_model", *map(str, arguments)])
    try:
        return language_model.main()
    except SystemExit as error:
        return error.code


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt must be a readable file"),
        (["empty.txt"], "text (empty.txt) must not be empty"),
        (["missing.tar"], "text (missing.tar) must be a tar of samples: shard_missing"),
        (["text.txt"], "for held_out_bytes (131072)"),
        (["text.txt", "--held-out-bytes", "2000", "--context", "90000"], "context (90000) must be"),
        (["text.txt", "--kinds", "eq7", "eq8"], "kinds (eq8) must be known: take some of softmax"),
        (["text.txt", "--heads", "3"], "width (256) must be divisible by heads (3)"),
        (["text.txt", "--steps", "0"], "steps (0) must be positive"),
        (["text.txt", "--contexts", "300", "512"], "contexts (300) must divide the longest (512)"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, text, monkeypatch, capsys):
    monkeypatch.chdir(text.parent)
    Path("empty.txt").write_text("\n \n")
    assert launch(monkeypatch, *arguments, "--out", "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_recorded_runs_are_not_repeated(text, monkeypatch, capsys):
    ran: list[language_model.Job] = []

    def pretend(jobs, settings, corpus, device, processes):
        for job in jobs:
            ran.append(job)
            yield {
                **vars(job),
                "attention": str(KINDS[job.kind]),
                "parameters": 10,
                "seconds": 1.0,
                "train_loss": 1.0,
                "document_bits": [3.0 * len(document) for document in corpus.held_out],
                "right_answers": [4, 3],
                "tokens_per_second": 1000.0,
                "peak_bytes": 2**20,
            }

    monkeypatch.setattr(language_model, "run_all", pretend)
    out = text.parent / "out"
    common = [text, "--out", out, "--held-out-bytes", 3000, "--contexts", 64, 128]
    assert launch(monkeypatch, *common, "--kinds", "softmax") == 0
    assert [job.task for job in ran] == ["speed", "speed", "text", "recall", "recall"]
    assert launch(monkeypatch, *common, "--kinds", "softmax", "eq7", "--seeds", 2) == 0
    assert len(ran) == len(set(ran)) == 5 * 2 + 3 * 2
    summary = (out / "summary.md").read_text()
    assert "| eq7 | 10 | 2 | 3.000 ± 0.000 | 0.000 ± 0.000 | 3.000 ± 0.000 | 1 |" in summary
    assert "| softmax | 2 | 87.5 ± 158.8 | 43.8 ± 79.4 |" in summary
    assert "| softmax | 1,000 | 1,000 |" in summary
    assert (out / "figure.png").stat().st_size > 10_000
    assert len((out / "runs.jsonl").read_text().splitlines()) == 16
    capsys.readouterr()
    assert launch(monkeypatch, *common, "--steps", 7) == 2
    assert "must be another folder" in capsys.readouterr().err
    monkeypatch.setitem(KINDS, "softmax", KINDS["eq4"])
    assert launch(monkeypatch, *common) == 2
    assert "softmax was softmax" in capsys.readouterr().err
    assert json.loads((out / "settings.json").read_text())["device"] == "cpu"
