"""How an argument is refused."""

import pytest


def check_names_itself(make, name, value, valid):
    """``make`` refuses the value by an error that begins with the argument's name, and has value and valid range."""
    with pytest.raises(ValueError, match=f"^{name} must be") as error:
        make(**{name: value})
    assert repr(value) in str(error.value)
    assert valid in str(error.value)
