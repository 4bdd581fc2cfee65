"""Validation of files of compute elements: all errors with their paths."""

from __future__ import annotations

import pytest
from support.paths import ROOT

from gubbins.logic.my_pilots import CEFileError, parse_ce_file

EXAMPLE = ROOT / "gubbins" / "examples" / "ces.yaml"


def problems_of(text: str) -> dict[str, str]:
    with pytest.raises(CEFileError) as caught:
        parse_ce_file(text)
    return dict(caught.value.problems)


def entry(**fields: object) -> str:
    return f"compute_elements: [{ {'name': 'ce', 'capacity': 1} | fields }]"


def test_the_example_is_valid() -> None:
    specs = parse_ce_file(EXAMPLE.read_text())
    assert [spec.backend for spec in specs] == ["simulated", "simulated", "local"]
    assert specs[0].success_rate == 1.0
    assert specs[0].enabled is None


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"capacity": -1}, "capacity"),
        ({"capacity": 1.5}, "capacity"),
        ({"capacity": "many"}, "capacity"),
        ({"success_rate": 1.01}, "success_rate"),
        ({"success_rate": -0.01}, "success_rate"),
        ({"nmae": 1}, "nmae"),
        ({"name": ""}, "name"),
        ({"name": "../etc"}, "name"),
        ({"vos": []}, "vos"),
        ({"backend": "slrum"}, "backend"),
        ({"settings": {"run_secs": 1}}, "settings.run_secs"),
        ({"settings": {"run_seconds": -1}}, "settings.run_seconds"),
        ({"backend": "local", "settings": {"directory": "here"}}, "settings.directory"),
        ({"rules": {"policy": "greedy"}}, "rules.policy"),
        ({"rules": {"share": 0}}, "rules.share"),
        ({"rules": {"max_waiting": "10"}}, "rules.max_waiting"),
        ({"rules": {"vos": {"lhcb": {"breaker_failures": 1}}}}, "rules.vos.lhcb.breaker_failures"),
        ({"rules": {"timeout_seconds": 60, "unconfirmed_seconds": 60}}, "rules"),
    ],
)
def test_bad_input_is_reported_with_its_path(fields: dict[str, object], path: str) -> None:
    assert list(problems_of(entry(**fields))) == [f"compute_elements[0].{path}"]


def test_an_invalid_value_which_may_be_a_secret_is_not_shown() -> None:
    arc = {"url": "https://ce.example.org/arex", "environment": {"PASSWORD": "s3cret"}}
    for settings in (
        arc,  # a mistake of all settings: neither certificate nor token
        arc | {"environment": {"PASSWORD": ["s3cret"]}},
        arc | {"environment": {"PASSWORD": 117_117}},
        arc | {"scripts": {"lhcb": {"s3cret": 1}}},
        arc | {"default_script": 117_117},
        arc | {"token": "/token", "cpus": {"PASSWORD": "s3cret"}},
        arc | {"token": "/token", "cpus": "s3cret"},
        arc | {"token": "/token", "url": "https://user:s3cret@ce.example.org/arex"},
        arc | {"token": "/token", "url": "https://ce.example.org:s3cret/arex"},
        arc | {"token": "s3cret"},
        arc | {"token": 117_117},
        arc | {"token": {"issuer": "https://user:s3cret@iam", "client_id": "a", "client_secret": "/secret"}},
        arc | {"token": {"issuer": "https://iam", "client_id": "a", "client_secret": "s3cret"}},
        arc | {"token": {"issuer": "https://iam", "client_id": "a", "client_secret": "/a", "scope": ["s3cret"]}},
        "s3cret",
    ):
        [problem] = problems_of(entry(backend="arc", settings=settings)).values()
        assert problem
        assert "s3cret" not in problem
        assert "117" not in problem
    for wrong in ({"capacity": "s3cret"}, {"vos": "s3cret"}, {"name": ["s3cret"]}, {"rules": {"share": "s3cret"}}):
        assert all(problem and "s3cret" not in problem for problem in problems_of(entry(**wrong)).values())
    assert "s3cret" not in str(problems_of('compute_elements: ["s3cret"]'))


def test_an_error_in_the_rules_names_the_known_fields() -> None:
    assert "max_per_cycle" in problems_of(entry(rules={"speed": 1}))["compute_elements[0].rules.speed"]
    of_a_vo = problems_of(entry(rules={"vos": {"lhcb": {"speed": 1}}}))["compute_elements[0].rules.vos.lhcb.speed"]
    assert "trickle" in of_a_vo
    assert "timeout_seconds" not in of_a_vo
    too_short = problems_of(entry(rules={"unconfirmed_seconds": 30}))["compute_elements[0].rules"]
    assert too_short.startswith("unconfirmed_seconds must be longer than timeout_seconds")


def test_all_errors_of_a_file_are_reported_at_once() -> None:
    text = """
compute_elements:
  - {name: a, capacity: -1, success_rate: 2}
  - {capacity: 1}
  - {name: b, capacity: 1}
  - {name: b, capacity: 1}
other: 1
"""
    problems = problems_of(text)
    assert set(problems) == {
        "other",
        "compute_elements[0].capacity",
        "compute_elements[0].success_rate",
        "compute_elements[1].name",
        "compute_elements[3].name",
    }
    assert "compute_elements[2]" in problems["compute_elements[3].name"]


@pytest.mark.parametrize("text", ["", "[]", "compute_elements: 1", "a: 1"])
def test_a_ce_file_of_another_structure_is_refused(text: str) -> None:
    assert "compute_elements" in problems_of(text)[""]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("2026-02-30", "line 4"),
        ("0x_", "line 4"),
        ("!!float s3cret", "line 4"),
        ("!!bool s3cret", "line 4"),
        ("!!int ''", "line 4"),
        ("!!timestamp s3cret", "line 4"),
        ("9" * 5_000, "line 4"),
        ("'\0'", ""),
        ("[" * 3_000, ""),
    ],
)
def test_any_invalid_yaml_is_an_error_of_one_line(value: str, line: str) -> None:
    [(path, problem)] = problems_of(
        f"compute_elements:\n  - name: ce\n    capacity: 1\n    vos: {value}\n"
    ).items()
    assert path == line
    assert "\n" not in problem
    assert len(problem) < 300
    assert "s3cret" not in problem


def test_entries_can_be_merged_with_others() -> None:
    text = """
compute_elements:
  - &first {name: a, capacity: 1, rules: &rules {trickle: 2, max_waiting: 3}}
  - {<<: *first, name: b, rules: {<<: *rules, trickle: 0, vos: {lhcb: &own {<<: *rules, max_waiting: 2}}}}
  - {<<: *first, name: c, rules: {<<: *own}}
"""
    _, b, c = parse_ce_file(text)
    assert (b.name, b.capacity, b.rules.trickle, b.rules.max_waiting) == ("b", 1, 0, 3)
    assert (c.rules.trickle, c.rules.max_waiting) == (2, 2)


def test_invalid_yaml_and_duplicate_keys_are_reported_with_their_line() -> None:
    assert all(path.startswith("line ") for path in problems_of("compute_elements:\n  - {name: a"))
    assert "appears twice" in problems_of("compute_elements:\n- name: a\n  name: b\n")["line 3"]


QUEUES = """
compute_elements:
  - name: ce01.example.org
    capacity: 10
    vos: [lhcb]
    backend: slurm
    settings: {directory: /scratch/pilots, cpus: 1}
    rules: {site: LCG.Example.org, max_waiting: 3}
    queues:
      short: {settings: {partition: short}, rules: {max_cpu_seconds: 3600}}
      gpu: {capacity: 2, settings: {partition: gpu, cpus: 8}, rules: {tags: [GPU], processors: 8, queue: gpu-long}}
"""


def test_each_queue_of_a_compute_element_has_its_own_settings_and_rules() -> None:
    short, gpu = parse_ce_file(QUEUES)
    assert (short.name, short.capacity, short.vos) == ("ce01.example.org:short", 10, ["lhcb"])
    assert short.settings == {"directory": "/scratch/pilots", "cpus": 1, "partition": "short"}
    assert (short.rules.site, short.rules.max_cpu_seconds, short.rules.max_waiting) == ("LCG.Example.org", 3600, 3)
    assert (short.rules.grid_ce, short.rules.queue) == ("ce01.example.org", "short")
    assert (gpu.name, gpu.capacity, gpu.settings["cpus"]) == ("ce01.example.org:gpu", 2, 8)
    assert (gpu.rules.tags, gpu.rules.processors, gpu.rules.queue) == (("GPU",), 8, "gpu-long")


@pytest.mark.parametrize(
    ("queues", "path"),
    [
        ("{}", "compute_elements[0].queues"),
        ("[short]", "compute_elements[0].queues"),
        ("{short: 1}", "compute_elements[0].queues"),
        ("{short: }", "compute_elements[0].queues"),
        ("{1: {}}", "compute_elements[0].queues"),
        ("{no: {}}", "compute_elements[0].queues"),
        ("{null: {}}", "compute_elements[0].queues"),
        ("{short: {name: long}}", "compute_elements[0].queues.short.name"),
        ("{[a]: {}}", "line 1"),
        ("{short: {rules: {max_cpu_seconds: soon}}}", "compute_elements[0].queues.short.rules.max_cpu_seconds"),
        ("{short: {settings: 1}}", "compute_elements[0].queues.short.settings"),
        ("{short: {rules: [1]}}", "compute_elements[0].queues.short.rules"),
        ("{'sh ort': {}}", "compute_elements[0].queues.sh ort.name"),
        ("{short: {capacity: -1}}", "compute_elements[0].queues.short.capacity"),
    ],
)
def test_an_error_in_a_queue_is_reported_with_its_path(queues: str, path: str) -> None:
    assert list(problems_of(f"compute_elements: [{{name: ce, capacity: 1, queues: {queues}}}]")) == [path]


def test_queues_of_a_compute_element_without_a_name_are_refused() -> None:
    for name in ("", "name: null, ", "name: [ce], "):
        assert list(problems_of(f"compute_elements: [{{{name}capacity: 1, queues: {{short: {{}}}}}}]")) == [
            "compute_elements[0].name"
        ]


@pytest.mark.parametrize("vos", ["{}", "{lhcb: s3cret}", "{lhcb: [s3cret]}", "{1: {}}", "{null: {}}", "{lhcb: }"])
def test_vos_without_a_name_or_settings_are_refused_without_their_values(vos: str) -> None:
    [(path, problem)] = problems_of(f"compute_elements: [{{name: ce, capacity: 1, vos: {vos}}}]").items()
    assert path == "compute_elements[0].vos"
    assert "each with its settings" in problem
    assert "s3cret" not in problem


@pytest.mark.parametrize("given", ["3", "null", "[lhcb]", "s3cret", "{lhcb: s3cret}", "{lhcb: {seed: 1}}"])
def test_settings_of_vos_are_given_in_one_place_only(given: str) -> None:
    [problem] = problems_of(f"compute_elements: [{{name: ce, capacity: 1, settings: {{vos: {given}}}}}]").values()
    assert "below `vos`" in problem
    assert "s3cret" not in problem


@pytest.mark.parametrize("backend", ["arc", "htcondor"])
@pytest.mark.parametrize(
    ("token", "path"),
    [
        ("s3cret", "token.file"),
        ({"issuer": "https://iam.example.org/", "client_id": "x", "client_secret": "s3cret"}, "client_secret"),
        ({"issuer": "https://x:s3cret@iam.example.org/", "client_id": "x", "client_secret": "/secret"}, "issuer"),
    ],
)
def test_an_error_in_the_source_of_a_token_is_reported_in_one_line(backend: str, token: object, path: str) -> None:
    place = {"arc": {"url": "https://ce.example.org/arex"}, "htcondor": {"collector": "ce:9619", "schedd": "ce"}}
    [(problem, why)] = problems_of(entry(backend=backend, settings=place[backend] | {"token": token})).items()
    assert problem.startswith("compute_elements[0].settings.token.")
    assert problem.endswith(path)
    assert "s3cret" not in why
