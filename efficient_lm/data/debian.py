"""Files of Debian packages, fetched with the machine's own apt: nothing is installed, nothing needs root.

The mirror is the one that this machine's apt already uses. A private source list in a scratch directory adds the
`non-free` component, where documentation with restrictive terms lives.
"""

import pathlib
import shutil
import subprocess

from efficient_lm.schema import ConfigError

_KEYRING = pathlib.Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_COMPONENTS = "main non-free"


def fetch(patterns, work: pathlib.Path, log=print) -> tuple[pathlib.Path, list[str]]:
    """Download and unpack packages under `work`.

    patterns: package names; one that ends in '*' means the newest package with that prefix and a digit after it.
    Returns the directory with the unpacked files and the `name=version` of each package.
    Raises ConfigError, one line, when this machine has no Debian apt or a download fails.
    """
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if not shutil.which(tool):
            raise ConfigError(f"{tool}: not found; this corpus comes from Debian packages, use a Debian machine")
    apt = _private_apt(work)
    log("updating the package list")
    _run(["apt-get", *apt, "update"], work)
    names = [_resolve(pattern, apt, work) for pattern in patterns]
    archives = work / "archives"
    archives.mkdir()
    for name in names:
        log(f"downloading {name}")
        _run(["apt-get", *apt, "download", name], archives)
    root = work / "root"
    for archive in sorted(archives.glob("*.deb")):
        log(f"unpacking {archive.name}")
        _run(["dpkg-deb", "-x", str(archive), str(root)], work)
    versions = [
        _run(["dpkg-deb", "--show", "--showformat", "${Package}=${Version}", str(archive)], work)
        for archive in sorted(archives.glob("*.deb"))
    ]
    return root, versions


def machine_mirror(work) -> tuple[str, str]:
    """(URI, release) of the Debian mirror in this machine's apt sources."""
    form = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)|$(RELEASE)"
    listing = _run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"], work)
    for line in listing.splitlines():
        origin, label, component, uri, release = line.split("|")
        # Updates and security archives hold only part of the packages.
        if (origin, label, component) == ("Debian", "Debian", "main") and "-" not in release:
            return uri, release
    raise ConfigError("apt: no Debian archive in this machine's package sources (run apt-get update once?)")


def _private_apt(work) -> list[str]:
    uri, release = machine_mirror(work)
    signed = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
    (work / "sources.list").write_text(f"deb {signed}{uri} {release} {_COMPONENTS}\n")
    (work / "lists" / "partial").mkdir(parents=True)
    options = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "",
        "Acquire::Retries": "3",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _resolve(pattern, apt, work) -> str:
    if not pattern.endswith("*"):
        return pattern
    prefix = pattern[:-1]
    names = _run(["apt-cache", *apt, "pkgnames", prefix], work).split()
    numbered = [n for n in names if n[len(prefix) :].replace(".", "").isdigit()]
    if not numbered:
        raise ConfigError(f"apt: no package {pattern} in this machine's Debian release")
    return max(numbered, key=lambda n: [int(x) for x in n[len(prefix) :].split(".")])


def _run(command, directory) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=None)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith(("E:", "dpkg-deb: error"))), (lines or ["failed"])[-1])
        raise ConfigError(f"{command[0]} {command[-2 if command[0] == 'dpkg-deb' else -1]}: {reason}")
    return done.stdout
