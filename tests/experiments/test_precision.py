"""The comparison of precisions against numbers worked out by hand."""

from experiments.precision import longest_rest, write


def test_summary_by_hand(tmp_path):
    curves = {
        "fp32": [(2.0, 10.0), (1.0, 10.2), (0.5, 10.3)],
        "bf16": [(2.2, 10.0), (1.0, 10.0), (0.5, 10.5)],
    }
    rows = [line for line in write(tmp_path, curves).splitlines() if line.startswith("| ")]
    assert rows[2] == "| fp32 | 0.5000 | 0.0e+00 | 10.0000 | 10.3000 | 2.00 | 0 |"
    assert rows[3] == "| bf16 | 0.5000 | 3.3e-02 | 10.0000 | 10.5000 | 5.00 | 1 |"
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 7
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_longest_rest():
    assert longest_rest([1.0, 1.0, 1.0, 2.0, 2.0]) == 2
    assert longest_rest([1.0]) == 0
