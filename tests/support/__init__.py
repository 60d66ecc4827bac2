"""Everything that the tests share; no test lives here."""
