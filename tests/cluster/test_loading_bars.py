import pytest

from trimode.cluster.loading_bars import loading_bars
from trimode.replicas.model.safetensors_reader import LoadReport


def test_the_bars_say_how_far_the_start_has_come() -> None:
    with loading_bars("8B", quiet=True) as bars:
        load, capture = bars.bars.tasks
        assert not capture.visible
        bars.on_load(3_000_000_000, 17_000_000_000)
        bars.on_capture(2, 106)
        assert load.description == "loading 8B"
        assert (load.completed, load.fields["amount"]) == (3e9, "3.0 GB of 17.0 GB")
        assert (capture.visible, capture.fields["amount"]) == (True, "2 of 106 sizes")


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.0, "weights loaded: 17.00 GB in 4.0 s (4.25 GB/s)"), (0.2, "")]
)
def test_only_a_load_that_took_its_time_says_how_fast_it_was(
    seconds: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with loading_bars("8B") as bars:
        bars.on_loaded(LoadReport(17_000_000_000, 17_000_000_000, seconds))
    assert capsys.readouterr().err.strip() == said
