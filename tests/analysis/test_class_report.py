"""Tables of classes, small and large."""

import json
import math

import torch

from diffmm.analysis.class_report import ClassReport


def test_few_classes_are_shown_whole():
    matrix = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    report = ClassReport.of_confusion(matrix, ["cat", "a dog with a very long name indeed", "cow"])
    lines = report.text().splitlines()
    assert lines[0].split()[:4] == ["true", "class", "\\", "predicted"]
    assert lines[1].split() == ["cat", "8", "2", "0", "10", "0.800"]
    assert lines[2].startswith("a dog with a very long …")
    assert lines[2].split()[-2:] == ["5", "1.000"]
    # A class without samples has no accuracy.
    assert lines[3].split() == ["cow", "0", "0", "0", "0", "-"]
    assert len({len(line) for line in lines}) == 1


def test_a_name_with_a_line_break_takes_one_line():
    report = ClassReport.of_confusion(torch.eye(2, dtype=torch.long), ["line\nbreak", "cat, big"])
    first, second = report.text().splitlines()[1:]
    assert first.startswith('"line\\nbreak" ')
    assert second.startswith('"cat, big" ')


def test_of_many_classes_the_worst_and_the_most_frequent_confusions_are_shown():
    matrix = torch.eye(50, dtype=torch.long) * 10
    matrix[7, 3], matrix[7, 7] = 6, 4
    matrix[9, 1], matrix[9, 9] = 2, 8
    matrix[11] = 0
    names = [f"class_{number}" for number in range(50)]
    text = ClassReport.of_confusion(matrix, names).text()
    assert "lowest accuracy of 50 classes:" in text
    worst, confusions = text.split("most frequent confusions:\n")
    assert [line.split() for line in worst.splitlines()[2:4]] == [
        ["class_7", "10", "0.400"],
        ["class_9", "10", "0.800"],
    ]
    assert len(worst.splitlines()) == 2 + 10 + 1
    assert "class_11" not in text
    assert [line.split() for line in confusions.splitlines()[1:]] == [
        ["class_7", "class_3", "6", "0.600"],
        ["class_9", "class_1", "2", "0.200"],
    ]
    perfect = ClassReport.of_confusion(torch.eye(50, dtype=torch.long), names).text()
    assert "confusions" not in perfect


def test_its_data_are_plain():
    report = ClassReport.of_confusion(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    data = json.loads(json.dumps(report.data(), allow_nan=False))
    assert data == {
        "classes": [
            {"class": "a", "samples": 4, "accuracy": 0.75},
            {"class": "b", "samples": 0, "accuracy": None},
        ],
        "confusion_matrix": [[3, 1], [0, 0]],
    }
    assert report.table() == [
        ["class", "samples", "accuracy", "predicted a", "predicted b"],
        ["a", 4, 0.75, 3, 1],
        ["b", 0, "", 0, 0],
    ]


def test_several_labels_have_average_precisions_and_no_confusions():
    table = torch.tensor([[0.5, math.nan], [3.0, 0.0]], dtype=torch.float64)
    report = ClassReport.of_average_precision(table, ["a", "b"])
    assert report.table() == [
        ["class", "samples", "average_precision"],
        ["a", 3, 0.5],
        ["b", 0, ""],
    ]
    assert report.text().splitlines()[1].split() == ["a", "3", "0.500"]
    assert "confusion_matrix" not in report.data()
