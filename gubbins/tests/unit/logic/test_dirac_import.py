"""Translation of a DIRAC configuration; options without a counterpart are listed."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from typing import Any

import pytest
import yaml
from diraccfg import CFG

from gubbins.domain.exceptions import DiracConfigurationError
from gubbins.logic.my_pilots import import_dirac, parse_ce_file
from gubbins.logic.my_pilots.dirac_import import DiracImport

CONFIGURATION = """
# A part of the configuration of a VO's installation.
DIRAC
{
  Setup = LHCb-Production
}
Systems
{
  WorkloadManagement
  {
    Agents
    {
      SiteDirectorCERN
      {
        MaxPilotsToSubmit = 100
        CETypes = HTCondorCE
      }
      JobCleaningAgent
      {
        PollingTime = 3600
      }
    }
  }
}
Resources
{
  StorageElements
  {
    CERN-disk
    {
      BackendType = EOS
    }
  }
  Sites
  {
    LCG
    {
      LCG.CERN.ch
      {
        Name = CERN-PROD
        VO = lhcb
        Coordinates = 6.0458:46.2325
        CEs
        {
          ce503.cern.ch
          {
            CEType = HTCondorCE
            MaxRAM = 16384
            architecture = x86_64
            Platform = x86_64-el9
            NumberOfProcessors = 8
            ExtraSubmitString = +JobFlavour = "nextweek"\\nrequest_disk = 20000
            GridEnv = /etc/gridenv
            Queues
            {
              ce503.cern.ch-condor
              {
                maxCPUTime = 9000
                SI00 = 3125
                MaxTotalJobs = 500
                MaxWaitingJobs = 40
                Tag = GPU, 8Processors
              }
            }
          }
        }
      }
      LCG.NDGF.se
      {
        CEs
        {
          arc.ndgf.se
          {
            CEType = AREX
            Port = 8443
            VO = lhcb, dteam
            Queues
            {
              nordugrid-SLURM-grid
              {
                maxCPUTime = 2880
                MaxTotalJobs = 20
              }
            }
          }
        }
      }
    }
    DIRAC
    {
      DIRAC.Cluster.org
      {
        CEs
        {
          cluster.example.org
          {
            CEType = SSH
            BatchSystem = SLURM
            SSHHost = login.example.org
            SSHUser = pilot
            SSHPassword = s3cret-word
            SSHKey = /etc/dirac/id_cluster
            SharedArea = /scratch/pilots
            SubmitOptions = --account=lhcb --constraint=avx2 -p old
            VO = lhcb
            Queues
            {
              short
              {
                maxCPUTime = 120
                MaxTotalJobs = 30
              }
              gpu
              {
                maxCPUTime = 1440
                MaxTotalJobs = 4
                RequiredTag = GPU
              }
            }
          }
          host.example.org
          {
            CEType = SSH
            SSHUser = pilot
            MaxTotalJobs = 3
          }
          oar.example.org
          {
            CEType = SSH
            BatchSystem = OAR
          }
          cream.example.org
          {
            CEType = CREAM
          }
        }
      }
    }
  }
}
"""
CLUSTER = "DIRAC/DIRAC.Cluster.org/CEs"


def entries_of(found: DiracImport) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in found.compute_elements}


def why(found: DiracImport) -> dict[str, str]:
    return {remark.path.removeprefix("Resources/Sites/"): remark.why for remark in found.remarks}


def test_compute_elements_are_imported_with_back_ends_limits_vos_and_tags() -> None:
    found = import_dirac(CONFIGURATION)
    entries = entries_of(found)
    assert list(entries) == ["ce503.cern.ch", "arc.ndgf.se", "cluster.example.org", "host.example.org"]
    condor = entries["ce503.cern.ch"]
    assert (condor["backend"], condor["capacity"], condor["vos"]) == ("htcondor", 500, ["lhcb"])
    assert condor["settings"] == {
        "collector": "ce503.cern.ch:9619",
        "schedd": "ce503.cern.ch",
        "token": "/etc/gubbins/ce503.cern.ch.token",
        "cpus": 8,
        "memory_mb": 16384,
        "submit_commands": {"+JobFlavour": '"nextweek"', "request_disk": "20000"},
    }
    assert condor["rules"] == {
        "policy": "waiting_jobs",
        "site": "LCG.CERN.ch",
        "max_waiting": 40,
        "queue": "ce503.cern.ch-condor",
        "platform": ["x86_64-el9"],
        "tags": ["GPU"],
        "max_cpu_seconds": 9000 * 60 * 3125 // 250,
        "processors": 8,
        "max_memory_mb": 16384,
    }
    arc = entries["arc.ndgf.se"]
    assert (arc["backend"], arc["settings"]["url"], arc["settings"]["queue"]) == (
        "arc",
        "https://arc.ndgf.se:8443/arex",
        "grid",
    )
    assert (arc["vos"], arc["rules"]["max_waiting"]) == (["lhcb", "dteam"], 10)
    host = entries["host.example.org"]
    assert (host["backend"], host["capacity"], host["settings"]) == (
        "ssh",
        3,
        {"host": "host.example.org", "username": "pilot"},
    )


def test_common_values_of_queues_are_merged() -> None:
    slurm = entries_of(import_dirac(CONFIGURATION))["cluster.example.org"]
    assert (slurm["backend"], slurm["vos"]) == ("slurm", ["lhcb"])
    assert {name: own["capacity"] for name, own in slurm["queues"].items()} == {"short": 30, "gpu": 4}
    short, gpu = parse_ce_file(yaml.safe_dump({"compute_elements": [slurm]}, sort_keys=False))
    assert (short.name, gpu.name) == ("cluster.example.org:short", "cluster.example.org:gpu")
    assert short.settings == {
        "ssh": {"host": "login.example.org", "username": "pilot", "client_keys": ["/etc/dirac/id_cluster"]},
        "directory": "/scratch/pilots",
        "partition": "short",
        "account": "lhcb",
        "extra_options": ["--constraint=avx2"],
    }
    assert (short.rules.max_cpu_seconds, short.rules.required_tags) == (7200, ())
    assert (gpu.rules.max_cpu_seconds, gpu.rules.required_tags) == (86400, ("GPU",))


def test_options_without_a_counterpart_are_listed_with_their_path_and_without_value() -> None:
    found = import_dirac(CONFIGURATION)
    reasons = why(found)
    expected = {
        "DIRAC": "not about compute elements",
        "Resources/StorageElements": "not about compute elements",
        "LCG/LCG.CERN.ch/Name": "not about pilots",
        "LCG/LCG.CERN.ch/CEs/ce503.cern.ch/GridEnv": "has no counterpart",
        f"{CLUSTER}/cluster.example.org/SSHPassword": "has no counterpart",
        f"{CLUSTER}/oar.example.org": "left out: no back end for SSH with the batch system oar",
        f"{CLUSTER}/cream.example.org": "left out: no back end for CREAM with the batch system host",
        "Systems/WorkloadManagement/Agents/SiteDirectorCERN": "this agent submits pilots until you stop it",
    }
    assert {path: reasons.get(path) for path in expected} == expected
    assert any(path.endswith("SiteDirectorCERN/MaxPilotsToSubmit") for path in reasons)
    assert any(path.endswith("short/SubmitOptions") and "left out" in why for path, why in reasons.items())
    assert any("needs credentials" in why for path, why in reasons.items() if "arc.ndgf.se" in path)
    assert "s3cret-word" not in str(found)


def test_every_option_is_imported_or_listed() -> None:
    """An unknown option in each section is listed once for each."""
    tree = CFG().loadFromBuffer(CONFIGURATION).getAsDict()
    sections = []

    def add(section: Any, path: str) -> None:
        section["Unknown"] = "of"
        sections.append(f"{path}/Unknown")
        for name, value in section.items():
            if isinstance(value, dict):
                add(value, f"{path}/{name}")

    add(tree["Resources"]["Sites"], "Resources/Sites")
    found = import_dirac(str(CFG().loadFromDict(tree)))
    listed = {remark.path for remark in found.remarks}
    unsupported = ("oar.example.org", "cream.example.org")  # listed as a whole
    wanted = {path for path in sections if not any(name in path for name in unsupported)}
    assert wanted <= listed


@pytest.mark.parametrize(("batch", "system"), [("GE", "gridengine"), ("Torque", "torque"), ("LSF", "lsf")])
@pytest.mark.parametrize("kind", ["SSH", "Local"])
def test_other_batch_systems_are_imported_with_their_queue(kind: str, batch: str, system: str) -> None:
    text = CONFIGURATION.replace("BatchSystem = SLURM", f"BatchSystem = {batch}").replace(
        "CEType = SSH\n            BatchSystem", f"CEType = {kind}\n            BatchSystem"
    )
    cluster = entries_of(import_dirac(text))["cluster.example.org"]
    short, _ = parse_ce_file(yaml.safe_dump({"compute_elements": [cluster]}, sort_keys=False))
    assert short.backend == "batch"
    assert (short.settings["system"], short.settings["queue"], "ssh" in short.settings) == (
        system,
        "short",
        kind == "SSH",
    )
    assert short.settings["extra_options"] == ["--account=lhcb", "--constraint=avx2", "-p", "old"]


def test_the_result_of_an_import_can_be_loaded() -> None:
    found = import_dirac(CONFIGURATION)
    text = yaml.safe_dump({"compute_elements": found.compute_elements}, sort_keys=False)
    assert len(parse_ce_file(text)) == 5
    assert not [remark for remark in found.remarks if "corrected by hand" in remark.why]


def test_a_share_of_the_slots_leaves_the_others_to_site_director() -> None:
    entries = entries_of(import_dirac(CONFIGURATION, share=0.25))
    assert (entries["ce503.cern.ch"]["capacity"], entries["host.example.org"]["capacity"]) == (125, 1)


@pytest.mark.parametrize(
    "text",
    [
        "Resources\n{\n",
        "Resources\n{\n}\n}\n",
        "{ x = 1 }",
        "A += 1",
        "Resources = 1",
        "Resources { Sites { { } } }",
        "Resources\n{\n  a/b\n  {\n  }\n}\n",
    ],
)
def test_invalid_configurations_are_an_error_of_one_line(text: str) -> None:
    with pytest.raises(DiracConfigurationError, match="not a configuration of DIRAC") as caught:
        import_dirac(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("Resources\n{\n  a line that says nothing\n  x = 1\n}\n", "line 3"),
        ("Resources\n{\n  x = 1\n}\nlast words", "line 5"),
        ("Resources\n{\n  x/y = 1\n}\n", "line 3"),
        ("Resources\n{\n  MaxRAM = 1\n  MaxRAM = 2\n}\n", "line 4"),
    ],
)
def test_lines_that_the_parser_ignores_are_listed(text: str, path: str) -> None:
    assert path in {remark.path for remark in import_dirac(text).remarks}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_stray_line_does_not_affect_other_lines(ending: str) -> None:
    expected = import_dirac(CONFIGURATION)
    lines = CONFIGURATION.splitlines()
    between = [number for number, line in enumerate([*lines, ""]) if not line.strip().startswith("{")]
    for number in between:
        found = import_dirac("\ufeff" + ending.join([*lines[:number], "s3cret words", *lines[number:]]))
        assert found.compute_elements == expected.compute_elements, number
        reasons = [remark.why for remark in found.remarks if remark.path == f"line {number + 1}"]
        assert reasons == ["is no option and no section: left out"]
        assert "s3cret" not in str(found.remarks)


@pytest.mark.parametrize("user", ["u{0} = x\n", "u{0}\n{{\nDN = /CN={0}\n}}\n", "u{0} {{\n}}\n"])
@pytest.mark.parametrize("path", ["Registry", "Registry\n{\nUsers"])
def test_many_users_take_linear_time(user: str, path: str) -> None:
    users = "".join(user.format(number) for number in range(20_000))
    before = time.process_time()
    found = import_dirac(f"{path}\n{{\n{users}}}\n{'}' * path.count('{')}\n{one_ce('CEType = SSH')}")
    assert time.process_time() - before < 3, "10 s with each user compared with all others"
    assert [entry["name"] for entry in found.compute_elements] == ["ce.example.org"]
    assert found.remarks[0] == ("Registry", "not about compute elements")


@pytest.mark.parametrize("users", ["{{Users{{a{{DN=x\n}}}}}}\n", "\n{{\nUsers {{ a\n{{\nDN=x }}\n}}}}}}\n"])
def test_the_braces_of_other_sections_may_be_anywhere(users: str) -> None:
    users = f"Registry {users.format()}"
    for text in (users + one_ce("CEType = SSH") + "\n", one_ce("CEType = SSH") + "\n" + users):
        assert [entry["name"] for entry in import_dirac(text).compute_elements] == ["ce.example.org"]


def one_ce(options: str) -> str:
    names = ("Resources", "Sites", "LCG", "LCG.Example.org", "CEs", "ce.example.org")
    return "".join(f"{name}\n{{\n" for name in names) + options + "\n}" * len(names)


@pytest.mark.parametrize(
    ("size", "tags"),
    [
        ("", {"MultiProcessor", "8Processors", "4GB"}),
        ("NumberOfProcessors = 4", {"8Processors", "4GB"}),
        ("NumberOfProcessors = 8\nMaxRAM = 4096", set()),
    ],
)
def test_tags_other_than_those_of_the_size_are_kept(size: str, tags: set[str]) -> None:
    [entry] = import_dirac(
        one_ce(f"CEType = SSH\nTag = MultiProcessor, 8Processors, 4GB\n{size}")
    ).compute_elements
    assert set(entry["rules"].get("tags", ())) == tags


@pytest.mark.parametrize(("speed", "limit"), [("", 7200), ("SI00 = 250", 7200), ("SI00 = 2500", 72_000)])
def test_cpu_times_of_queues_are_compared_with_those_of_jobs_as_in_dirac(speed: str, limit: int) -> None:
    """DIRAC: `60 / 250 * maxCPUTime * SI00`; without SI00 the unit is that of jobs."""
    [entry] = import_dirac(one_ce(f"CEType = SSH\nmaxCPUTime = 120\n{speed}")).compute_elements
    assert entry["rules"]["max_cpu_seconds"] == limit


def test_tags_of_a_compute_element_are_added_to_those_of_its_queues() -> None:
    queues = "Queues\n{\na\n{\nTag = x\nRequiredTag = y\n}\nb\n{\nTag = GPU\n}\n}"
    [entry] = import_dirac(one_ce(f"CEType = SSH\nTag = GPU\nRequiredTag = z\n{queues}")).compute_elements
    rules = {spec.name: spec.rules for spec in parse_ce_file(yaml.safe_dump({"compute_elements": [entry]}))}
    assert rules["ce.example.org:a"].tags == ("x", "GPU")
    assert rules["ce.example.org:a"].required_tags == ("y", "z")
    assert (rules["ce.example.org:b"].tags, rules["ce.example.org:b"].required_tags) == (("GPU",), ("z",))


@pytest.mark.parametrize("hosts", ["wn1/5, wn2/10", "wn1 wn2"])
def test_hosts_that_are_left_out_are_listed(hosts: str) -> None:
    found = import_dirac(one_ce(f"CEType = SSHBatch\nSSHHost = {hosts}"))
    assert found.compute_elements[0]["settings"]["host"] == "wn1"
    assert any(path.endswith("/SSHHost") and "several hosts" in reason for path, reason in found.remarks)


@pytest.mark.parametrize("port", ["ssh", "²", "-1", "1e999"])
@pytest.mark.parametrize(("kind", "option"), [("SSH", "SSHPort"), ("AREX", "Port"), ("HTCondorCE", "Port")])
def test_an_invalid_port_is_listed(kind: str, option: str, port: str) -> None:
    found = import_dirac(one_ce(f"CEType = {kind}\n{option} = {port}"))
    assert any(remark.path.endswith(f"/{option}") and "no number" in remark.why for remark in found.remarks)
    assert parse_ce_file(yaml.safe_dump({"compute_elements": found.compute_elements}))


@pytest.mark.parametrize("seed", range(20))
def test_the_import_from_dirac_handles_any_configuration(seed: int) -> None:
    """Lines removed, doubled, exchanged, with values that are no numbers, no paths, no names."""
    chance = random.Random(seed)
    lines = CONFIGURATION.splitlines()
    for _ in range(chance.randint(1, 30)):
        at = chance.randrange(len(lines))
        change = chance.randrange(4)
        if change == 0:
            del lines[at]
        elif change == 1:
            lines.insert(at, lines[chance.randrange(len(lines))])
        elif "=" in lines[at]:
            value = chance.choice(["", "many", "1e400", "-5", "'", "ü", "a b c", "../x", "NaN", "--x=" * 50])
            lines[at] = f"{lines[at].partition('=')[0]}= {value}"
    with suppress(DiracConfigurationError):
        yaml.safe_dump(import_dirac("\n".join(lines)).compute_elements)
