"""What the page is made of beside its words: style, script, figures that follow dark mode, maps."""
