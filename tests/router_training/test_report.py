"""Evaluation records as Markdown."""

from typing import Any

from router_training.report import comparison_table, evaluation_table, evaluation_verdict, markdown_table


def make_record(routed: float = 0.5, **changes: Any) -> dict[str, Any]:
    policies = {"base": 2.0, "own_adapter": 0.5, "uniform": 1.0, "routed": routed}
    return {
        "chats": {"maths": 60},
        "policies": {name: {"maths": {"nll": nll, "own_share": 0.93}} for name, nll in policies.items()},
        "ratio_to_own_adapter": {"maths": routed / 0.5},
        "mean_ratio_to_own_adapter": routed / 0.5,
        "beats_base": ["maths"],
        "beats_uniform": ["maths"],
        **changes,
    }


def test_table_has_one_row_per_task_and_the_mean_ratio() -> None:
    lines = evaluation_table(make_record()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "task",
        "chats",
        "base",
        "own adapter",
        "uniform mix",
        "routed",
        "routed / own",
        "own adapter's share",
    ]
    assert cells[2] == ["maths", "60", "2.000", "0.500", "1.000", "0.500", "1.000", "93 %"]
    assert cells[3][0] == "mean"
    assert cells[3][6] == "1.000"
    assert len({len(line) for line in lines}) == 1


def test_verdict_names_where_the_router_loses() -> None:
    assert evaluation_verdict(make_record()) == (
        "The router beats the base model on all 1 tasks and beats the uniform mix on all 1 tasks."
    )
    assert "does not beat the uniform mix on maths" in evaluation_verdict(make_record(beats_uniform=[]))


def test_comparison_puts_records_side_by_side() -> None:
    table = comparison_table({"layer": make_record(0.5), "projection": make_record(0.75)})
    assert "| layer | projection |" in table.splitlines()[0]
    assert "| 0.500 |      0.750 |" in table.splitlines()[2]
    assert "| 1.000 |      1.500 |" in table.splitlines()[3]


def test_columns_are_padded_to_their_widest_cell() -> None:
    assert markdown_table(["task", "n"], [["a", "1000"]]) == "| task |    n |\n| ---- | ---: |\n| a    | 1000 |"
