//! Gregorian calendar arithmetic for the clock: seconds since 1970 to date and time of day, and back.
//!
//! The day count uses years that start in March, so that the leap day is the last of its year: see H. Hinnant,
//! "chrono-Compatible Low-Level Date Algorithms". UTC without leap seconds; years before 1583 are proleptic.

/// Seconds in a day.
pub(super) const DAY_S: i64 = 86_400;

/// A date and a time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    /// Year of the common era.
    pub year: i64,
    /// 1 to 12.
    pub month: i64,
    /// Day of the month, from 1.
    pub day: i64,
    /// 0 to 23.
    pub hour: i64,
    /// 0 to 59.
    pub minute: i64,
    /// 0 to 59.
    pub second: i64,
}

impl DateTime {
    /// The date and time that is so many seconds after 1970-01-01 00:00:00.
    pub fn from_unix_s(seconds: i64) -> DateTime {
        let (days, time) = (seconds.div_euclid(DAY_S), seconds.rem_euclid(DAY_S));
        // Day 0 is 0000-03-01, and an era is 400 years.
        let days = days + 719_468;
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        DateTime {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// Seconds since 1970-01-01 00:00:00. Total: fields out of range carry, so 31 April is 1 May and a month 13 is the
    /// January after.
    pub fn to_unix_s(self) -> i64 {
        let months = self.year * 12 + self.month - 1;
        let (year, month) = (months.div_euclid(12), months.rem_euclid(12) + 1);
        let year = year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let month_from_march = if month > 2 { month - 3 } else { month + 9 };
        let day_of_year = (153 * month_from_march + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * DAY_S + self.hour * 3600 + self.minute * 60 + self.second
    }

    /// Day of the week: 0 is Sunday.
    pub fn weekday(self) -> i64 {
        // 1970-01-01 was a Thursday.
        (self.to_unix_s().div_euclid(DAY_S) + 4).rem_euclid(7)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(year: i64, month: i64, day: i64, hour: i64, minute: i64, second: i64) -> DateTime {
        DateTime {
            year,
            month,
            day,
            hour,
            minute,
            second,
        }
    }

    #[test]
    fn known_moments() {
        // (seconds since 1970, date and time, weekday), from `date -u`.
        let cases = [
            (0, at(1970, 1, 1, 0, 0, 0), 4),
            (-1, at(1969, 12, 31, 23, 59, 59), 3),
            (951_782_400, at(2000, 2, 29, 0, 0, 0), 2),
            (1_000_000_000, at(2001, 9, 9, 1, 46, 40), 0),
            (2_147_483_647, at(2038, 1, 19, 3, 14, 7), 2),
            (4_107_542_400, at(2100, 3, 1, 0, 0, 0), 1),
            (253_402_300_799, at(9999, 12, 31, 23, 59, 59), 5),
        ];
        for (seconds, date, weekday) in cases {
            assert_eq!(DateTime::from_unix_s(seconds), date);
            assert_eq!(date.to_unix_s(), seconds);
            assert_eq!(date.weekday(), weekday, "{date:?}");
        }
    }

    #[test]
    fn fields_out_of_range_carry() {
        let cases = [
            (at(2023, 4, 31, 0, 0, 0), at(2023, 5, 1, 0, 0, 0)),
            (at(2023, 2, 29, 0, 0, 0), at(2023, 3, 1, 0, 0, 0)),
            (at(2023, 13, 1, 0, 0, 0), at(2024, 1, 1, 0, 0, 0)),
            (at(2023, 0, 0, 0, 0, 0), at(2022, 11, 30, 0, 0, 0)),
            (at(2023, 12, 31, 23, 59, 60), at(2024, 1, 1, 0, 0, 0)),
        ];
        for (odd, plain) in cases {
            assert_eq!(DateTime::from_unix_s(odd.to_unix_s()), plain, "{odd:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn seconds_survive_the_round_trip(seconds in -100_000_000_000i64..300_000_000_000) {
            prop_assert_eq!(DateTime::from_unix_s(seconds).to_unix_s(), seconds);
        }

        #[test]
        fn dates_survive_the_round_trip(
            year in 0i64..10_000, month in 1i64..=12, day in 1i64..=28, hour in 0i64..24, minute in 0i64..60, second in 0i64..60,
        ) {
            let date = at(year, month, day, hour, minute, second);
            prop_assert_eq!(DateTime::from_unix_s(date.to_unix_s()), date);
        }

        #[test]
        fn the_next_day_is_the_next_weekday(seconds in -100_000_000_000i64..300_000_000_000) {
            let today = DateTime::from_unix_s(seconds).weekday();
            let tomorrow = DateTime::from_unix_s(seconds + DAY_S).weekday();
            prop_assert_eq!((today + 1) % 7, tomorrow);
        }
    }
}
