import pickle

from trimode.replicas.errors import InvalidRequest, RequestError, TrimodeError


def test_an_invalid_request_tells_field_and_reason() -> None:
    error = InvalidRequest("seed", "must be in [0, 2^63), is -1")
    assert (error.field, error.reason) == ("seed", "must be in [0, 2^63), is -1")
    assert str(error) == "seed: must be in [0, 2^63), is -1"


def test_an_invalid_request_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequest("seed", "is -1")))
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.reason) == ("seed", "is -1")


def test_every_request_error_can_be_caught_as_one() -> None:
    assert issubclass(InvalidRequest, RequestError)
    assert issubclass(RequestError, TrimodeError)
