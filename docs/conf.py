project = "convexprune"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "convexprune"
exclude_patterns = ["_build"]
