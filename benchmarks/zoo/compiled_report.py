def as_markdown(rows):
    return ""
