-- The database iterable_challenge: two tables, the index of Query 2, and a sample of 15 customers and 40 page views.
--
--     mysql -u root -p < database_setup.sql
--
-- For MySQL 8.0 and later and MariaDB 10.2 and later. Where one of the two tables is there already, it stops with the
-- server's error and changes nothing. The sample's times are relative to the day of loading, so it goes stale within a
-- week. To renew it, drop the database with all that is in it, and load this file again:
--
--     mysql -u root -p -e 'DROP DATABASE iterable_challenge'

SET NAMES utf8mb4 COLLATE utf8mb4_unicode_ci; -- a collation that both kinds of server know

CREATE DATABASE IF NOT EXISTS iterable_challenge CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci;
USE iterable_challenge;

-- Which of the two tables is there: the first by name, or NULL.
SET @table_there = (
    SELECT MIN(table_name) FROM information_schema.tables
    WHERE table_schema = DATABASE() AND table_name IN ('customers', 'page_views')
);
-- Every time here is UTC, and so must be the day that CURDATE() gives. Where page_views is there without customers,
-- this is an error, for the error of its CREATE TABLE would come too late: after a new customers table.
SET time_zone = IF(@table_there = 'page_views', 'none, for page_views already exists', '+00:00');

CREATE TABLE customers (
    id         BIGINT NOT NULL AUTO_INCREMENT,
    first_name VARCHAR(255),
    last_name  VARCHAR(255),
    email      VARCHAR(255) COMMENT 'What Iterable knows the customer by, so without one nothing can be sent',
    plan_type  VARCHAR(50) NOT NULL DEFAULT 'free' COMMENT 'free, basic, pro or enterprise',
    PRIMARY KEY (id),
    UNIQUE KEY customers_email (email)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_unicode_ci;

-- page_views_recent is the index of Query 2. It holds every column that the query reads (the id is in each InnoDB
-- index), so the query finds the recent views of its two pages side by side and never opens the table itself.
CREATE TABLE page_views (
    id         BIGINT NOT NULL AUTO_INCREMENT COMMENT 'Names the event in Iterable, too: page-view-<id>',
    user_id    BIGINT NOT NULL COMMENT 'customers.id',
    page       VARCHAR(100) NOT NULL COMMENT 'home, docs, pricing, settings ...',
    browser    VARCHAR(255) COMMENT 'desktop, mobile or tablet',
    location   VARCHAR(255) COMMENT 'City and country',
    event_time DATETIME NOT NULL COMMENT 'UTC, whatever the time zone of the server',
    PRIMARY KEY (id),
    KEY page_views_user_id (user_id),
    KEY page_views_recent (page, event_time, user_id, browser, location),
    CONSTRAINT page_views_customer FOREIGN KEY (user_id) REFERENCES customers (id) ON DELETE CASCADE
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_unicode_ci;

-- The sample. Three of its customers are what the queries look for, on the day of loading and on five days after it:
-- sarah.johnson@email.com, olivia.brown@email.com and mia.harris@email.com. The WHERE keeps it out of tables that were
-- there already, for some clients go on after an error: with --force, or when the file is loaded with SOURCE.
START TRANSACTION;

INSERT INTO customers (id, first_name, last_name, email, plan_type)
SELECT id, first_name, last_name, email, plan_type
FROM (
    SELECT
        1 AS id, 'James' AS first_name, 'Wilson' AS last_name,
        'james.wilson@email.com' AS email, 'free' AS plan_type
    UNION ALL SELECT 2,  'Sarah',   'Johnson',  'sarah.johnson@email.com',  'pro'
    UNION ALL SELECT 3,  'Michael', 'Chen',     'michael.chen@email.com',   'basic'
    UNION ALL SELECT 4,  'Emily',   'Davis',    'emily.davis@email.com',    'pro'
    UNION ALL SELECT 5,  'David',   'Martinez', 'david.martinez@email.com', 'free'
    UNION ALL SELECT 6,  'Aisha',   'Khan',     'aisha.khan@email.com',     'enterprise'
    UNION ALL SELECT 7,  'Olivia',  'Brown',    'olivia.brown@email.com',   'pro'
    UNION ALL SELECT 8,  'Daniel',  'Kim',      'daniel.kim@email.com',     'pro'
    UNION ALL SELECT 9,  'Sophie',  'Dubois',   'sophie.dubois@email.com',  'basic'
    UNION ALL SELECT 10, 'Lucas',   'Silva',    'lucas.silva@email.com',    'free'
    UNION ALL SELECT 11, 'Hannah',  'Schmidt',  'hannah.schmidt@email.com', 'pro'
    UNION ALL SELECT 12, 'Mia',     'Harris',   'mia.harris@email.com',     'pro'
    UNION ALL SELECT 13, 'Noah',    'Anderson', 'noah.anderson@email.com',  'pro'
    UNION ALL SELECT 14, 'Grace',   'Okafor',   'grace.okafor@email.com',   'enterprise'
    UNION ALL SELECT 15, 'Ethan',   'Taylor',   'ethan.taylor@email.com',   'pro'
) AS sample
WHERE @table_there IS NULL;

INSERT INTO page_views (id, user_id, page, browser, location, event_time)
SELECT id, user_id, page, browser, location, TIMESTAMP(CURDATE() - INTERVAL days_ago DAY, time_of_day)
FROM (
    SELECT
        1 AS id, 11 AS user_id, 'settings' AS page, 'desktop' AS browser,
        'Köln, DE' AS location, 45 AS days_ago, '09:41:07' AS time_of_day
    UNION ALL SELECT 2,  8,  'home',      'mobile',  'Seoul, KR',         41, '20:15:33'
    UNION ALL SELECT 3,  1,  'home',      'desktop', 'New York, US',      33, '13:02:18'
    UNION ALL SELECT 4,  11, 'pricing',   'tablet',  'Köln, DE',          20, '18:27:55'
    UNION ALL SELECT 5,  5,  'blog',      'mobile',  'Madrid, ES',        18, '22:08:41'
    UNION ALL SELECT 6,  12, 'pricing',   'desktop', 'Sydney, AU',        16, '07:55:02'
    UNION ALL SELECT 7,  14, 'home',      'desktop', 'Lagos, NG',         15, '10:30:26'
    UNION ALL SELECT 8,  3,  'docs',      'desktop', 'Seattle, US',       14, '15:44:39'
    UNION ALL SELECT 9,  15, 'pricing',   'mobile',  'Austin, US',        12, '17:22:10'
    UNION ALL SELECT 10, 2,  'settings',  'desktop', 'San Francisco, US', 11, '11:19:48'
    UNION ALL SELECT 11, 9,  'home',      'tablet',  'Lyon, FR',          10, '08:37:21'
    UNION ALL SELECT 12, 8,  'pricing',   'mobile',  'Seoul, KR',         8,  '23:59:59' -- a second too old
    UNION ALL SELECT 13, 7,  'pricing',   'desktop', 'Toronto, CA',       7,  '00:00:00' -- 7 days, exactly
    UNION ALL SELECT 14, 10, 'pricing',   'mobile',  'São Paulo, BR',     7,  '00:00:00' -- same, other plan
    UNION ALL SELECT 15, 15, 'home',      'desktop', 'Austin, US',        7,  '00:00:00' -- same, other page
    UNION ALL SELECT 16, 6,  'home',      'desktop', 'Dubai, AE',         6,  '06:12:50'
    UNION ALL SELECT 17, 2,  'pricing',   'mobile',  'San Francisco, US', 6,  '10:05:14'
    UNION ALL SELECT 18, 5,  'docs',      'mobile',  'Madrid, ES',        6,  '21:49:03'
    UNION ALL SELECT 19, 1,  'blog',      NULL,      'New York, US',      5,  '09:08:29'
    UNION ALL SELECT 20, 9,  'settings',  'tablet',  'Lyon, FR',          5,  '12:33:57'
    UNION ALL SELECT 21, 4,  'docs',      'desktop', 'London, GB',        5,  '14:21:36'
    UNION ALL SELECT 22, 14, 'pricing',   'desktop', 'Lagos, NG',         5,  '16:58:44'
    UNION ALL SELECT 23, 7,  'docs',      'tablet',  'Toronto, CA',       4,  '10:47:15'
    UNION ALL SELECT 24, 3,  'settings',  'desktop', 'Seattle, US',       4,  '13:26:08'
    UNION ALL SELECT 25, 12, 'dashboard', 'mobile',  NULL,                4,  '23:11:52'
    UNION ALL SELECT 26, 2,  'settings',  'desktop', 'San Francisco, US', 3,  '08:54:30'
    UNION ALL SELECT 27, 5,  'pricing',   'mobile',  'Madrid, ES',        3,  '19:40:17'
    UNION ALL SELECT 28, 6,  'settings',  'desktop', 'Dubai, AE',         3,  '20:02:45'
    UNION ALL SELECT 29, 10, 'home',      'mobile',  'São Paulo, BR',     3,  '22:35:59'
    UNION ALL SELECT 30, 4,  'home',      'tablet',  'London, GB',        2,  '08:16:42'
    UNION ALL SELECT 31, 12, 'pricing',   'mobile',  'Sydney, AU',        2,  '09:20:31' -- the same second
    UNION ALL SELECT 32, 12, 'settings',  'mobile',  'Sydney, AU',        2,  '09:20:31' -- a higher id
    UNION ALL SELECT 33, 15, 'docs',      'desktop', 'Austin, US',        2,  '15:03:24'
    UNION ALL SELECT 34, 7,  'settings',  'tablet',  'Toronto, CA',       2,  '16:48:12' -- her latest
    UNION ALL SELECT 35, 9,  'pricing',   'tablet',  'Lyon, FR',          1,  '07:29:11'
    UNION ALL SELECT 36, 1,  'pricing',   'desktop', 'New York, US',      1,  '11:50:38'
    UNION ALL SELECT 37, 2,  'pricing',   'desktop', 'San Francisco, US', 1,  '14:30:45' -- her latest
    UNION ALL SELECT 38, 7,  'dashboard', 'tablet',  'Toronto, CA',       1,  '15:10:06' -- later, other page
    UNION ALL SELECT 39, 4,  'dashboard', 'desktop', 'London, GB',        1,  '18:45:20'
    UNION ALL SELECT 40, 2,  'settings',  'mobile',  'San Francisco, US', 4,  '17:36:53' -- arrived late
) AS sample
WHERE @table_there IS NULL;

COMMIT;
