"""What a command says, without the lines that depend on how busy the machine is."""


def without_announcements(output: str) -> list[str]:
    """The lines of `output` but those that announce work which lasts more than a second, as "reading x .."."""
    return [line for line in output.splitlines() if not line.endswith(" ..")]
