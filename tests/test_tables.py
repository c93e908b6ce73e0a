"""Tables are Markdown that can be read as it is."""

from fcmae.tables import table


def test_a_table_is_markdown_with_the_first_column_left_and_the_others_right() -> None:
    text = "|    |  n |\n| -- | -: |\n| a  | 10 |\n| bc |  1 |"
    assert table(["", "n"], [["a", "10"], ["bc", "1"]]) == text
    assert table(["", "n"], iter([("a", "10"), ("bc", "1")])) == text


def test_more_columns_are_left_where_asked_and_no_row_is_a_table_too() -> None:
    assert table(["a", "b", "c"], [["1", "22", "333"]], left=2) == (
        "| a | b  |   c |\n| - | -- | --: |\n| 1 | 22 | 333 |"
    )
    assert table(["model", "n"], []) == "| model |  n |\n| ----- | -: |"
