"""`python -m benchmarks.data`: its measurements and conclusions."""

import pytest

from benchmarks.data import Rate, main, measure, verdict, waiting


def rates(**samples: float) -> dict[int, Rate]:
    return {int(name[1:]): Rate(rate, 0.0, 1.0) for name, rate in samples.items()}


def test_waiting_is_a_share_of_the_step() -> None:
    assert waiting(100.0, 100.0, num_workers=0) == 0.5  # they alternate
    assert waiting(300.0, 100.0, num_workers=0) == 0.25
    assert waiting(100.0, 100.0, num_workers=2) == 0.0  # they overlap
    assert waiting(25.0, 100.0, num_workers=2) == 0.75


def test_the_verdict_names_the_bottleneck() -> None:
    assert (
        verdict(rates(w0=5000, w2=100), 100) == "the model is the bottleneck, even without workers"
    )
    assert verdict(rates(w0=200, w2=90, w4=400), 100).endswith("with num_workers 4 or more")
    slow = verdict(rates(w0=10, w2=20), 100)
    assert slow.startswith("the data is the bottleneck: at best 0.20 of what the model takes")
    assert slow.endswith("(2 workers), 80% of the time is waiting")


def test_a_recipe_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found, needed = measure("image/digits_tiny", workers=[0, 1], needed=None, seconds=0.1)
    assert all(
        rate.samples > 0 and rate.mebibytes > 0 and not rate.tokens for rate in found.values()
    )
    assert needed is not None
    assert needed > 0
    main(["text/stdlib_tiny", "--workers", "0", "--needed", "1e9", "--seconds", "0.1"])
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["text/stdlib_tiny", "0"]
    assert "tokens/s" in line
    assert "the model takes 1,000,000,000 samples/s: the data is the bottleneck" in last
    with pytest.raises(SystemExit):
        main(["--needed", "-1"])
    assert "--needed must be positive, got -1.0" in capsys.readouterr().err
