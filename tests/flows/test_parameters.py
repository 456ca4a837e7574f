"""The parameter records: descriptions, bounds, and the schema for Prefect's forms."""

import pytest
from pydantic import ValidationError

from flows.cli import COMMANDS
from flows.jobs.pipeline import PipelineParameters
from flows.jobs.seeds import SeedsParameters
from flows.jobs.train import TrainParameters

RECORDS = [command.parameters for command in COMMANDS.values()]
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
        {"color": "blue"},
    ],
    ids=str,
)
def test_bad_values_are_rejected(wrong):
    TrainParameters(**TRAIN)
    with pytest.raises(ValidationError):
        TrainParameters(**(TRAIN | wrong))


def test_lists_are_split_at_commas():
    assert PipelineParameters(data="d", modes="weak, full").modes == ("weak", "full")
    assert SeedsParameters(data="d", mode="full", out="o", seeds="3,4").seeds == (3, 4)
    for seeds in ("", "3,", "3,3", "3;4"):
        with pytest.raises(ValidationError):
            SeedsParameters(data="d", mode="full", out="o", seeds=seeds)
    for modes in ("", "full,full", "full,half", ()):
        with pytest.raises(ValidationError):
            PipelineParameters(data="d", modes=modes)


def test_lists_are_arrays_in_forms():
    schema = PipelineParameters.model_json_schema()["properties"]["modes"]
    assert schema["type"] == "array"
    assert schema["items"]["enum"] == ["full", "weak"]
    assert (schema["minItems"], schema["maxItems"]) == (1, 2)
