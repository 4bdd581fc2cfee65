"""Translation of a DIRAC configuration: the compute elements of SiteDirector, as entries for `gubbins ce load`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from gubbins.domain.exceptions import CEFileError, DiracConfigurationError
from gubbins.domain.matching import tags_of
from gubbins.domain.rules import CERules, DemandPolicy
from gubbins.domain.text import one_line

from .ce_file import CE_NAME, parse_ce_file

MAX_CONFIGURATION_BYTES = 64 * 1024 * 1024

_DIRAC_SLOTS, _DIRAC_WAITING = 10, 10  # SiteDirector's own limits where none is given
_SECONDS = 60  # maxCPUTime is in minutes, of a processor of SI00
_SI00 = 250  # of the unit of CPU times in jobs

#: Options of sites, compute elements and queues that do not concern pilots.
_NOT_ABOUT_PILOTS = {"CE", "Coordinates", "Country", "Description", "Mail", "MoUTierLevel", "Name", "OS", "SE"}
_NOT_ABOUT_PILOTS |= {"SubmissionMode", "Tier", "architecture"}
_TRANSLATED = ("Resources", "Systems")
_RESOURCES = {"Computing": "defaults of compute elements, if any, have to be copied to their sites"}


class Remark(NamedTuple):
    """A part of the configuration that was ignored or changed."""

    path: str
    why: str


@dataclass
class DiracImport:
    """Result of a translation."""

    compute_elements: list[dict[str, Any]] = field(default_factory=list)
    """Entries of a file for `gubbins ce load`."""
    remarks: list[Remark] = field(default_factory=list)
    """Parts without a counterpart, or that need attention, in the order of the configuration."""


class _Section:
    """A section of the configuration; records which options were read, and remarks on them."""

    def __init__(self, values: Mapping[str, Any], path: str, outer: _Section | None = None) -> None:
        self.path, self.outer = path, outer
        self.options = {name: str(value) for name, value in values.items() if not isinstance(value, Mapping)}
        self.sections = {name: value for name, value in values.items() if isinstance(value, Mapping)}
        self.read: set[str] = set()
        self.remarks: list[Remark] = [] if outer is None else outer.remarks

    def remark(self, why: str, option: str = "") -> None:
        """Add a remark on this section, or on one of its options."""
        self.remarks.append(Remark(f"{self.path}/{option}" if option else self.path, why))

    def section(self, name: str) -> _Section:
        """Get a subsection; an empty one if it does not exist."""
        return _Section(self.sections.get(name, {}), f"{self.path}/{name}", self)

    def text(self, *names: str, inherit: bool = False) -> str | None:
        """Read the first of these options that is set here or, with `inherit`, in an outer section."""
        for name in names:
            if name in self.options:
                self.read.add(name)
                return self.options[name].strip() or None
        return self.outer.text(*names, inherit=True) if inherit and self.outer is not None else None

    def as_list(self, name: str, *, inherit: bool = True) -> list[str]:
        """Read an option as a list."""
        return [word for word in re.split(r"[,\s]+", self.text(name, inherit=inherit) or "") if word]

    def merged_list(self, name: str) -> list[str]:
        """Read an option as a list, with the words of all outer sections, as DIRAC does for tags."""
        words = self.as_list(name, inherit=False) + (self.outer.merged_list(name) if self.outer else [])
        return list(dict.fromkeys(words))

    def unused(self, *known: str) -> Iterator[Remark]:
        """Remarks on options that were not read, and on subsections other than the known ones."""
        for name in self.options:
            if name not in self.read:
                about = "not about pilots" if name in _NOT_ABOUT_PILOTS else "has no counterpart"
                yield Remark(f"{self.path}/{name}", about)
        for name in self.sections:
            if name not in known:
                yield Remark(f"{self.path}/{name}", "has no counterpart")


def import_dirac(text: str, *, share: float = 1.0) -> DiracImport:
    """Translate a configuration of DIRAC into entries of a file of compute elements.

    Each compute element of `Resources/Sites` becomes an entry, and its queues become `queues`. Options without a
    counterpart are listed as remarks, without their values, which may be secrets.

    Args:
        text: the configuration, in DIRAC's format.
        share: fraction of the slots, 0.0-1.0, while SiteDirector uses the rest.

    Raises:
        DiracConfigurationError: the text cannot be parsed.
    """
    if len(text) > MAX_CONFIGURATION_BYTES:
        raise DiracConfigurationError(f"it is longer than {MAX_CONFIGURATION_BYTES >> 20} MB")
    from diraccfg import CFG

    result = DiracImport()
    text = _without_stray_lines(text.removeprefix("\ufeff"), result.remarks)
    try:
        tree: Any = CFG().loadFromBuffer(_without_other_sections(text)).getAsDict()
    except Exception as error:  # the library documents no errors
        raise DiracConfigurationError(one_line(error.args[0] if error.args else error, 300)) from error
    if not isinstance(tree.get("Resources", {}), Mapping):
        raise DiracConfigurationError("`Resources` is no section")
    result.remarks += [Remark(name, "not about compute elements") for name in tree if name not in _TRANSLATED]
    resources: Mapping[str, Any] = tree.get("Resources", {})
    result.remarks += [
        Remark(f"Resources/{name}", _RESOURCES.get(name, "not about compute elements"))
        for name in resources
        if name != "Sites"
    ]
    result.remarks += _site_directors(tree.get("Systems", {}), "Systems")
    sites = _Section(resources, "Resources").section("Sites")
    result.remarks += sites.unused(*sites.sections)
    seen: dict[str, str] = {}
    for grid in sites.sections:
        of_grid = sites.section(grid)
        result.remarks += of_grid.unused(*of_grid.sections)
        for name in of_grid.sections:
            _import_site(of_grid.section(name), name, share, result, seen)
    return result


def _without_stray_lines(text: str, remarks: list[Remark]) -> str:
    """Remove lines that are neither an option nor a section: DIRAC's parser would add them to the next name.

    Adds remarks on these lines, on options that the parser ignores, and on duplicate options.
    """
    open_sections: list[set[str]] = [set()]
    lines = text.split("\n")
    name, at = "", 0

    def drop() -> None:
        if name:
            lines[at] = lines[at][: lines[at].rindex(name)]
            remarks.append(Remark(f"line {at + 1}", "is no option and no section: left out"))

    for number, raw in enumerate(lines):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if not line.startswith("{"):
            drop()
            name = ""
        if _is_option(line):
            option = line.partition("=")[0].rstrip("+ ")
            if "/" in option:
                remarks.append(Remark(f"line {number + 1}", "has a / in the name of an option: left out"))
            if option in open_sections[-1] and "+=" not in line:
                remarks.append(
                    Remark(f"line {number + 1}", f"{option[:80]!r} is given twice: the last one counts")
                )
            open_sections[-1].add(option)
            continue
        if "{" in line and "/" in name + line:
            raise DiracConfigurationError(f"line {number + 1}: a section has a / in its name, give it another one")
        for character in line:
            if character == "{":
                open_sections.append(set())
            elif character == "}" and len(open_sections) > 1:
                open_sections.pop()
        name = line.rpartition("}")[2].rpartition("{")[2].strip()
        at = number
    drop()
    return "\n".join(lines)


def _is_option(line: str) -> bool:
    return "=" in line and "{" not in line.partition("=")[0]


def _without_other_sections(text: str) -> str:
    """Remove the contents of sections that are not translated: the parser takes quadratic time for many users."""
    kept, depth, name, top = [], 0, "", ""
    for line in map(str.strip, text.split("\n")):
        for word in [line] if line.startswith("#") or _is_option(line) else re.findall(r"[{}]|[^{}]+", line):
            if word == "}":
                depth = max(0, depth - 1)
            if depth == 0 or top in _TRANSLATED:
                kept.append(word)
            if word == "{":
                top = top if depth else name
                depth += 1
            elif word != "}":
                name = word.strip()
        kept.append("\n")
    return "".join(kept)


def _site_directors(tree: Any, path: str) -> Iterator[Remark]:
    """Remarks on the SiteDirector agents of the configuration."""
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if not isinstance(value, Mapping):
            continue
        if name.startswith("SiteDirector"):
            for option in value:
                yield Remark(
                    f"{path}/{name}/{option}", "an option of SiteDirector: see the rules of compute elements"
                )
            yield Remark(f"{path}/{name}", "this agent submits pilots until you stop it")
        else:
            yield from _site_directors(value, f"{path}/{name}")


def _import_site(site: _Section, name: str, share: float, result: DiracImport, seen: dict[str, str]) -> None:
    ces = site.section("CEs")
    if not ces.sections:
        result.remarks.append(Remark(site.path, "has no section `CEs`"))
    found: list[tuple[_Section, dict[str, Any]]] = []
    site.remarks = ces.remarks = []  # they follow the remarks on the site
    for ce_name in ces.sections:
        ce = ces.section(ce_name)
        if ce_name in seen:
            ce.remark(f"left out: its name is that of {seen[ce_name]}")
            continue
        seen[ce_name] = ce.path
        if not re.match(CE_NAME, ce_name):
            ce.remark("left out: names have letters, digits and . _ : -")
            continue
        entry = _entry(ce, ce_name, name, share)
        if entry is not None:
            found.append((ce, entry))
    result.remarks += [*site.unused("CEs"), *ces.unused(*ces.sections), *site.remarks]
    for ce, entry in found:
        result.remarks += _check(ce.path, entry)
        result.compute_elements.append(entry)


def _entry(ce: _Section, name: str, site: str, share: float) -> dict[str, Any] | None:
    """Translate a compute element to an entry of the file; None: there is no back end for it."""
    kind = ce.text("CEType") or "no CEType"
    batch = (ce.text("BatchSystem") or "Host").lower()
    backend, settings_of = _BACKENDS.get((kind.lower(), batch), ("", None))
    if settings_of is None:
        ce.remark(f"left out: no back end for {kind[:40]} with the batch system {batch[:40]}")
        return None
    made: dict[str, dict[str, Any]] = {}
    queues = ce.section("Queues")
    for queue_name in queues.sections or ("",):
        queue = queues.section(queue_name) if queue_name else ce
        made[queue_name] = _queue(queue, queue_name, name, site, settings_of, share)
        if queue is not ce:
            ce.remarks += queue.unused()
    ce.remarks += [*queues.unused(*queues.sections), *ce.unused("Queues")]
    first, *others = made.values()
    shared = {key: value for key, value in first.items() if all(own.get(key) == value for own in others)}
    entry = {"name": name, "backend": backend, **shared}
    if others:
        entry["queues"] = {queue: _without(own, shared) for queue, own in made.items()}
    return entry


def _without(settings: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in shared}


def _queue(
    queue: _Section, queue_name: str, name: str, site: str, settings_of: _Settings, share: float
) -> dict[str, Any]:
    slots = _number(queue, "MaxTotalJobs")
    if slots is None:
        queue.remark(f"not given: {_DIRAC_SLOTS} slots, as SiteDirector has it", "MaxTotalJobs")
        slots = _DIRAC_SLOTS
    waiting, minutes = _number(queue, "MaxWaitingJobs"), _number(queue, "maxCPUTime")
    processors, memory = _number(queue, "NumberOfProcessors"), _number(queue, "MaxRAM")
    speed = _number(queue, "SI00") or _SI00
    size = CERules(processors=min(processors or 1, 10_000), max_memory_mb=min(memory or 0, 10**8) or None)
    by_size = tags_of(size)
    tags = [word for word in queue.merged_list("Tag") if word not in by_size]
    rules: dict[str, Any] = {"policy": str(DemandPolicy.WAITING_JOBS), "site": site}
    rules["max_waiting"] = _DIRAC_WAITING if waiting is None else waiting
    optional: dict[str, Any] = {
        "queue": queue_name,
        "platform": queue.as_list("Platform"),
        "tags": tags,
        "required_tags": queue.merged_list("RequiredTag"),
        "max_cpu_seconds": _SECONDS * minutes * speed // _SI00 if minutes else None,
        "processors": processors if processors and processors > 1 else None,
        "max_memory_mb": memory,
    }
    rules |= {rule: value for rule, value in optional.items() if value}
    entry: dict[str, Any] = {"capacity": round(slots * share) or (1 if slots and share else 0)}
    if vos := queue.as_list("VO"):
        entry["vos"] = vos
    own = {"cpus": processors, "memory_mb": memory, "queue": queue_name}
    entry["settings"] = settings_of(queue, name, own)
    entry["rules"] = rules
    return entry


def _number(queue: _Section, *names: str) -> int | None:
    given = queue.text(*names, inherit=True)
    try:
        if given is None or (number := int(float(given))) >= 0:
            return None if given is None else number
    except (ValueError, OverflowError):
        pass
    queue.remark("is no number from 0 on: left out", names[0])
    return None


_Settings: TypeAlias = Callable[[_Section, str, Mapping[str, Any]], dict[str, Any]]


def _non_empty(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value not in (None, "", [], {})}


def _ssh(queue: _Section, name: str) -> dict[str, Any]:
    host, *others = queue.as_list("SSHHost") or [name]
    if others:
        queue.remark("names several hosts: only the first is used, others need an entry each", "SSHHost")
    key = queue.text("SSHKey", inherit=True)
    return _non_empty(
        host=host.partition("/")[0],  # host/slots
        username=queue.text("SSHUser", inherit=True),
        port=_number(queue, "SSHPort", "Port"),
        client_keys=[key] if key else None,
    )


def _ssh_settings(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    return _non_empty(**_ssh(queue, name), workdir=queue.text("SharedArea", "WorkArea", inherit=True))


def _local_settings(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    return _non_empty(directory=queue.text("SharedArea", "WorkArea", inherit=True))


def _submit_directory(queue: _Section) -> str:
    directory = queue.text("SharedArea", "WorkArea", inherit=True)
    if directory is None or not directory.startswith("/"):
        queue.remark("no absolute directory: check `settings.directory`", "SharedArea")
        return "/var/lib/gubbins/pilots"
    return directory


def _submit_options(queue: _Section) -> list[str]:
    try:
        return shlex.split(queue.text("SubmitOptions", inherit=True) or "")
    except ValueError:
        queue.remark("cannot be parsed: left out", "SubmitOptions")
        return []


def _slurm(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    options, account, partition = [], None, own["queue"] or None
    for word in _submit_options(queue):
        option, _, value = word.partition("=")
        if option == "--account" and value:
            account = value
        elif option == "--partition" and value:
            partition = value
        elif word.startswith("--"):
            options.append(word)
        else:
            queue.remark("has words that are no `--option=value`: left out", "SubmitOptions")
    return _non_empty(
        directory=_submit_directory(queue),
        partition=partition,
        account=account,
        cpus=own["cpus"],
        memory_mb=own["memory_mb"],
        extra_options=options,
    )


def _batch(system: str, *, by_ssh: bool) -> Callable[..., dict[str, Any]]:
    def settings(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
        cpus = None if system == "gridengine" else own["cpus"]
        if cpus != own["cpus"]:
            queue.remark("add a parallel environment of Grid Engine to `extra_options`", "NumberOfProcessors")
        return _non_empty(
            system=system,
            ssh=_ssh(queue, name) if by_ssh else None,
            directory=_submit_directory(queue),
            queue=own["queue"],
            cpus=cpus,
            memory_mb=own["memory_mb"],
            extra_options=_submit_options(queue),
        )

    return settings


def _slurm_by_ssh(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    return {"ssh": _ssh(queue, name), **_slurm(queue, name, own)}


def _arc(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    port = _number(queue, "Port")
    host = queue.text("Host", inherit=True) or name
    queue.remark(f"needs credentials: put a certificate (or a `token`) at /etc/gubbins/{name}.pem")
    return _non_empty(
        url=f"https://{host}{f':{port}' if port else ''}/arex",
        certificate=f"/etc/gubbins/{name}.pem",
        queue=(own["queue"] or "").rpartition("-")[2],  # nordugrid-SLURM-grid: the queue `grid`
        cpus=own["cpus"],
        memory_mb=own["memory_mb"],
    )


def _htcondor(queue: _Section, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    queue.remark(f"needs credentials: put a token at /etc/gubbins/{name}.token")
    commands = {}
    for line in re.split(r"\\n|\n", queue.text("ExtraSubmitString", inherit=True) or ""):
        command, equals, value = line.partition("=")
        if equals and re.fullmatch(r"(\+|(?i:MY)\.)?[A-Za-z_]\w*", command.strip()):
            commands[command.strip()] = value.strip()
        elif line.strip():
            queue.remark("has a line that is no `name = value`: left out", "ExtraSubmitString")
    return _non_empty(
        collector=f"{name}:{_number(queue, 'Port') or 9619}",
        schedd=name,
        token=f"/etc/gubbins/{name}.token",
        cpus=own["cpus"],
        memory_mb=own["memory_mb"],
        submit_commands=commands,
    )


_BACKENDS: dict[tuple[str, str], tuple[str, _Settings]] = {
    ("ssh", "host"): ("ssh", _ssh_settings),
    ("ssh", "slurm"): ("slurm", _slurm_by_ssh),
    ("sshbatch", "host"): ("ssh", _ssh_settings),
    ("local", "host"): ("local", _local_settings),
    ("local", "slurm"): ("slurm", _slurm),
    ("slurm", "host"): ("slurm", _slurm),
    ("slurm", "slurm"): ("slurm", _slurm),
    ("arc", "host"): ("arc", _arc),
    ("arc6", "host"): ("arc", _arc),
    ("arex", "host"): ("arc", _arc),
    ("htcondorce", "host"): ("htcondor", _htcondor),
    **{
        (kind, batch): ("batch", _batch(system, by_ssh=kind == "ssh"))
        for kind in ("ssh", "local")
        for batch, system in (("ge", "gridengine"), ("torque", "torque"), ("pbs", "pbs"), ("lsf", "lsf"))
    },
}


def _check(path: str, entry: Mapping[str, Any]) -> Sequence[Remark]:
    """Remarks on mistakes in the entry, which `gubbins ce load` would refuse."""
    import yaml

    try:
        parse_ce_file(yaml.safe_dump({"compute_elements": [entry]}))
    except CEFileError as error:
        return [Remark(path, f"to be corrected by hand: {where}: {what}") for where, what in error.problems]
    return ()
