"""The parameter records: described, bounded, and fit for Prefect's forms."""

import inspect

import pytest
from pydantic import BaseModel, ValidationError

from flows import parameters as p

RECORDS = [
    record
    for name, record in inspect.getmembers(p, inspect.isclass)
    if issubclass(record, BaseModel) and name.endswith("Parameters")
]
TRAIN = {"data": "d", "mode": "full", "out": "o"}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_field_is_described(record):
    assert record.__doc__
    for name, field in record.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_number_is_bounded(record):
    def check(name, schema):
        for option in schema.get("anyOf", [schema]):
            if option.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & option.keys(), name
                assert "maximum" in option, name

    for name, schema in record.model_json_schema()["properties"].items():
        check(name, schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"epochs": "ten"},
        {"epochs": 1.5},
        {"seed": -1},
        {"mode": "both"},
        {"device": "tpu"},
        {"precision": "float16"},
        {"selection_split": "train"},
        {"parent_run_id": "xyz"},
        {"colour": "blue"},
    ],
    ids=str,
)
def test_bad_values_are_refused(wrong):
    p.TrainParameters(**TRAIN)
    with pytest.raises(ValidationError):
        p.TrainParameters(**(TRAIN | wrong))


def test_lists_as_on_a_command_line():
    assert p.PipelineParameters(data="d", modes="weak, full").modes == ("weak", "full")
    assert p.SeedsParameters(data="d", mode="full", out="o", seeds="3,4").seeds == (3, 4)
    for seeds in ("", "3,", "3,3", "3;4"):
        with pytest.raises(ValidationError):
            p.SeedsParameters(data="d", mode="full", out="o", seeds=seeds)
    for modes in ("", "full,full", "full,half", ()):
        with pytest.raises(ValidationError):
            p.PipelineParameters(data="d", modes=modes)


def test_lists_are_lists_in_forms():
    schema = p.PipelineParameters.model_json_schema()["properties"]["modes"]
    assert schema["type"] == "array"
    assert schema["items"]["enum"] == ["full", "weak"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 2)
