"""The report page, and its parts: curves, pictures, tables and the style sheet, each from plain values to markup."""
