-- Every pro customer who looked at the pricing or settings page in the last 7 days (since midnight UTC), with the latest
-- such view. Three ways to ask, which give the same rows on any data with unique ids. main.py runs query_2, and the small
-- queries below it, which it finds here by name; query_1 and query_3 are there to compare.
--
--     mysql -u root -p -t < phase2_queries.sql
--
-- For MySQL 8.0 and later and MariaDB 10.2 and later. An account with SELECT alone is enough.

USE iterable_challenge;
SET time_zone = '+00:00';  -- event_time is UTC, so "today" must be as well

-- name: query_1
-- A window function in a derived table: the views of each customer are numbered from the latest to the oldest,
-- and number 1 is kept. A WHERE cannot ask for the number that its own SELECT makes, hence the outer one.
SELECT
    ranked.user_id,
    ranked.first_name,
    ranked.email,
    ranked.plan_type,
    ranked.view_id,
    ranked.page,
    ranked.browser,
    ranked.location,
    ranked.event_time
FROM (
    SELECT
        customers.id AS user_id,
        customers.first_name,
        customers.email,
        customers.plan_type,
        page_views.id AS view_id,
        page_views.page,
        page_views.browser,
        page_views.location,
        page_views.event_time,
        ROW_NUMBER() OVER (
            PARTITION BY customers.id
            ORDER BY page_views.event_time DESC, page_views.id DESC
        ) AS recency
    FROM page_views
    INNER JOIN customers ON customers.id = page_views.user_id
    WHERE customers.plan_type = 'pro'
        AND page_views.page IN ('pricing', 'settings')
        AND page_views.event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)
) AS ranked
WHERE ranked.recency = 1
ORDER BY ranked.user_id;

-- name: query_2
-- The same numbering in a common table expression, so that it reads from top to bottom: first the recent views with the
-- ids of their customers, then the customers' other columns, for the latest view only. Indexes are enough for the first
-- part, and numbering takes less time with few columns. This is the one that main.py runs.
-- A STRAIGHT_JOIN is an INNER JOIN in this order. Left the choice, MariaDB may go through the customers and look up
-- the views of each, which takes many times as long.
WITH recent_views AS (
    SELECT
        customers.id AS user_id,
        page_views.id AS view_id,
        page_views.page,
        page_views.browser,
        page_views.location,
        page_views.event_time,
        -- customers.id, because the collation of page_views.user_id may ignore case where that of customers.id does
        -- not: 'ab' and 'AB' would be one customer. Of two views at the same second, the one with the higher id counts.
        ROW_NUMBER() OVER (
            PARTITION BY customers.id
            ORDER BY page_views.event_time DESC, page_views.id DESC
        ) AS recency
    FROM page_views
    STRAIGHT_JOIN customers ON customers.id = page_views.user_id
    WHERE page_views.page IN ('pricing', 'settings')
        AND page_views.event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)
)

SELECT
    customers.id AS user_id,
    customers.first_name,
    customers.email,
    customers.plan_type,
    recent_views.view_id,
    recent_views.page,
    recent_views.browser,
    recent_views.location,
    recent_views.event_time
FROM recent_views
STRAIGHT_JOIN customers ON customers.id = recent_views.user_id
WHERE recent_views.recency = 1
    AND customers.plan_type = 'pro'
ORDER BY customers.id;

-- name: query_3
-- Aggregate and join back, as it was done before window functions: the latest time of each customer, the highest
-- id at that time, the view with that id. The filter on the page stands twice, because a view of another page may
-- be at the same second.
SELECT
    customers.id AS user_id,
    customers.first_name,
    customers.email,
    customers.plan_type,
    page_views.id AS view_id,
    page_views.page,
    page_views.browser,
    page_views.location,
    page_views.event_time
FROM (
    SELECT MAX(at_latest_time.id) AS id
    FROM (
        SELECT
            customers.id AS user_id,
            MAX(page_views.event_time) AS event_time
        FROM page_views
        INNER JOIN customers ON customers.id = page_views.user_id
        WHERE page_views.page IN ('pricing', 'settings')
            AND page_views.event_time >= DATE_SUB(CURDATE(), INTERVAL 7 DAY)
        GROUP BY customers.id
    ) AS latest_time
    INNER JOIN page_views AS at_latest_time
        ON at_latest_time.user_id = latest_time.user_id
        AND at_latest_time.event_time = latest_time.event_time
    WHERE at_latest_time.page IN ('pricing', 'settings')
    GROUP BY latest_time.user_id
) AS latest_view
INNER JOIN page_views ON page_views.id = latest_view.id
INNER JOIN customers ON customers.id = page_views.user_id
WHERE customers.plan_type = 'pro'
ORDER BY customers.id;

-- name: future_views
-- The latest view that lies more than a minute ahead (a clock may be a little fast), or NULL. A view that has not
-- happened yet means that event_time is local time, east of UTC, and not UTC. West of UTC this cannot be seen.
SELECT MAX(event_time) AS latest
FROM page_views
WHERE page IN ('pricing', 'settings')
    AND event_time > UTC_TIMESTAMP() + INTERVAL 1 MINUTE;

-- name: columns
-- No row, but every column that the queries read: main.py looks at their types before it runs query_2, because
-- the server would compare a number with 'pro' as well, and find 0 = 'pro' true. The join fails where the two ids
-- are texts that cannot be compared.
SELECT
    customers.id AS `customers.id`,
    customers.first_name AS `customers.first_name`,
    customers.email AS `customers.email`,
    customers.plan_type AS `customers.plan_type`,
    page_views.id AS `page_views.id`,
    page_views.user_id AS `page_views.user_id`,
    page_views.page AS `page_views.page`,
    page_views.browser AS `page_views.browser`,
    page_views.location AS `page_views.location`,
    page_views.event_time AS `page_views.event_time`
FROM page_views
INNER JOIN customers ON customers.id = page_views.user_id
WHERE FALSE;

-- name: customers_by_id
-- Which of some customers are still there, and their addresses. main.py puts a list of up to 1000 ids in the place of
-- the variable. By hand, look up one: SET @customer_ids = 2
SELECT
    id,
    email
FROM customers
WHERE id IN (@customer_ids);
