"""The HTML report, part by part: each file makes one part of the page, `render` puts them together."""
