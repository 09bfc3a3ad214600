"""The page that shows what a quickstart run found."""
