"""Every method from one teacher, on the same data, seeds and budgets: trained, scored and laid side by side."""
