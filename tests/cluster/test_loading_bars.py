from trimode.cluster.loading_bars import loading_bars


def test_the_bars_say_how_far_the_start_has_come() -> None:
    with loading_bars("8B", quiet=True) as bars:
        load, capture = bars.bars.tasks
        assert not capture.visible
        bars.on_load(3_000_000_000, 17_000_000_000)
        bars.on_capture(2, 106)
        assert load.description == "loading 8B"
        assert (load.completed, load.fields["amount"]) == (3e9, "3.0 GB of 17.0 GB")
        assert (capture.visible, capture.fields["amount"]) == (True, "2 of 106 sizes")
