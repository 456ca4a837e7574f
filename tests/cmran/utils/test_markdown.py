"""Markdown tables."""

from cmran.utils.markdown import markdown_table


def test_a_table_escapes_its_cells() -> None:
    text = markdown_table(["name", "value"], [["a|b", None], ["two\nlines", 1.5]])
    assert text == "| name | value |\n| --- | --- |\n| a\\|b | - |\n| two lines | 1.5 |"


def test_numbers_are_aligned_and_rounded() -> None:
    text = markdown_table(["name", "value", "count"], [["a", 1.0 / 3, 7]], align="right", digits=2)
    assert text == "| name | value | count |\n| --- | ---: | ---: |\n| a | 0.33 | 7 |"
