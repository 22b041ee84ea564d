"""The ground floor: rules that every layer shares. Imports nothing of fastkd."""
