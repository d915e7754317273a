"""BibTeX entries, and conversion of methods text with [@keys] to HTML with a reference list."""

from __future__ import annotations

import re
from html import escape

_ENTRY = re.compile(r"@(\w+)\{([^,\s]+),(.*?)\n\}", re.DOTALL)
_FIELD = re.compile(r"^\s*(\w+)\s*=\s*\{(.*)\},?\s*$", re.MULTILINE)
# [@key], [@one; @two] or [words; @key]; and a bare @key.
_CITATION = re.compile(r"\[([^\[\]]*@[\w:-]+[^\[\]]*)\]|(?<![\w.])@([A-Za-z][\w:-]*)")
_KEY = re.compile(r"@([\w:-]+)")
_ACCENTS = {r"{\"e}": "ë", r"{\"o}": "ö", r"{\'e}": "é", r"{\u{a}}": "ă", r"{\v{c}}": "č", r"{\v{s}}": "š"}


def read_entries(bibtex: str) -> dict[str, dict[str, str]]:
    """Read BibTeX with one field per line.

    Parameters
    ----------
    bibtex : str
        Contents of a ``.bib`` file.

    Returns
    -------
    dict of str to dict
        Fields by citation key, in the order of the file; the entry type is the field `type`.
    """
    return {
        key: {"type": kind.lower(), **{name.lower(): value for name, value in _FIELD.findall(body)}}
        for kind, key, body in _ENTRY.findall(bibtex)
    }


def cited_keys(markdown: str) -> list[str]:
    """Return the citation keys of a text in the order of their first mention."""
    keys: dict[str, None] = {}
    for group, single in _CITATION.findall(markdown):
        for key in _KEY.findall(group) or [single]:
            keys.setdefault(key)
    return list(keys)


def entry_html(entry: dict[str, str]) -> str:
    """Format an entry as an item of a reference list."""
    authors = [name.strip() for name in _plain(entry.get("author", "")).split(" and ")]
    surnames = [name.split(",")[0] for name in authors if name != "others"]
    who = (
        surnames[0]
        if len(authors) == 1
        else " and ".join(surnames)
        if len(authors) == 2
        else f"{surnames[0]} et al."
    )
    where = _plain(entry.get("journal", entry.get("booktitle", "")))
    url = f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", "")
    parts = [
        f"{escape(who)} ({escape(entry.get('year', 'n.d.'))}). {escape(_plain(entry.get('title', '')))}."
    ]
    if where:
        parts.append(f"<em>{escape(where)}</em>.")
    if url:
        parts.append(f'<a href="{escape(url)}">{escape(url.removeprefix("https://"))}</a>')
    return " ".join(parts)


def methods_html(markdown: str, entries: dict[str, dict[str, str]]) -> str:
    """Convert methods text to HTML: paragraphs, headings, emphasis, code and numbered citations.

    Parameters
    ----------
    markdown : str
        Text with `[@key; @key]` or `@key` citations.
    entries : dict of str to dict
        Entries of `read_entries`. Keys without an entry are kept as text.

    Returns
    -------
    str
        HTML fragment with the reference list at its end.
    """
    known = [key for key in cited_keys(markdown) if key in entries]
    numbers = {key: number for number, key in enumerate(known, start=1)}

    def link(match: re.Match[str]) -> str:
        return f'<a href="#ref-{match[1]}">{numbers[match[1]]}</a>' if match[1] in numbers else match[0]

    def cite(match: re.Match[str]) -> str:
        inside = re.sub(r";\s*(?=@)", ", ", match[1] or f"@{match[2]}")
        return f"[{_KEY.sub(link, inside)}]"

    blocks = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        text = escape(" ".join(block.split()), quote=False)
        heading = re.match(r"(#{1,6})\s+(.*)", text)
        text = heading[2] if heading else text
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
        text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
        text = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)
        text = _CITATION.sub(cite, text)
        blocks.append(f"<h4>{text}</h4>" if heading else f"<p>{text}</p>")
    if known:
        items = "".join(f'<li id="ref-{key}">{entry_html(entries[key])}</li>' for key in known)
        blocks.append(f'<h4>References</h4><ol class="references">{items}</ol>')
    return "\n".join(blocks)


def _plain(latex: str) -> str:
    for accent, letter in _ACCENTS.items():
        latex = latex.replace(accent, letter)
    return latex.replace("{", "").replace("}", "").replace("--", "\N{EN DASH}")
