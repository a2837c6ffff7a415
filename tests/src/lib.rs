//! podhull-tests
