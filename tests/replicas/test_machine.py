from importlib.metadata import version

from trimode.replicas.machine import describe_machine


def test_the_versions_of_what_is_installed_are_told_and_none_of_what_is_not() -> None:
    found = describe_machine("torch", "no-such-distribution")
    assert found["versions"] == {"torch": version("torch"), "no-such-distribution": None}
    assert found["cpus"] >= 1
    assert found["processor"]
