"""Reports: records in; text, HTML, Markdown, CSV and JSON out."""

if __name__ != "loka.reports":
    raise ImportError(
        "this folder is the package loka.reports: write 'import loka.reports' instead of 'import reports'"
    )
