"""Parts of the report page: curves, pictures, tables and the style sheet, each from plain values to markup."""
