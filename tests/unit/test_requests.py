"""A request and the options of its functions are declared apart: they must say the same."""

from dataclasses import MISSING, fields
from typing import Any

import pytest

from mlx_diffgemma import EditRequest, FillRequest, Options, Request, Settings
from mlx_diffgemma.tasks.edit import EditOptions
from mlx_diffgemma.tasks.fill import FillOptions


@pytest.mark.parametrize(
    ("request_type", "options"),
    [(Request, Options), (FillRequest, FillOptions), (EditRequest, EditOptions)],
)
def test_options_are_the_fields_that_have_defaults(request_type: Any, options: Any) -> None:
    optional = {f.name for f in fields(request_type) if f.default is not MISSING}
    assert optional == set(options.__annotations__)
    assert set(Settings.__annotations__) < set(Options.__annotations__)
